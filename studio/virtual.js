// Tables of many rows: only those near the screen are elements, two empty bodies stand for the rest.

import { el, syncRows } from "./dom.js";

const MARGIN = 12; // rows above and below the screen, so that scrolling by a little draws nothing

/**
 * Keep a table's rows in line with a list of any length, all of one height.
 * options: columns, keyOf(item), make(item), update(node, item).
 */
export class VirtualRows {
  constructor(table, options, signal) {
    this.options = options;
    this.items = [];
    this.body = el("tbody");
    this.above = pad(options.columns);
    this.below = pad(options.columns);
    table.append(this.above, this.body, this.below);
    this.height = 28;
    this.frame = null;
    const later = () => { this.frame ??= requestAnimationFrame(() => { this.frame = null; this.draw(); }); };
    addEventListener("scroll", later, { passive: true, signal });
    addEventListener("resize", later, { passive: true, signal });
  }

  set(items) {
    this.items = items;
    this.draw();
  }

  draw() {
    const { body, above, below, items, options } = this;
    if (!body.isConnected) return;
    const top = this.above.getBoundingClientRect().top;
    const first = Math.max(0, Math.min(items.length - 1, Math.floor(-top / this.height)) - MARGIN);
    const last = Math.min(items.length, first + Math.ceil(innerHeight / this.height) + 2 * MARGIN);
    syncRows(body, items.slice(first, last), options.keyOf, options.make, options.update);
    setHeight(above, first * this.height);
    setHeight(below, (items.length - last) * this.height);
    const measured = body.firstElementChild?.getBoundingClientRect().height;
    if (measured && Math.abs(measured - this.height) > 0.2) {
      this.height = measured;
      this.draw();
    }
  }

  /** Bring an item's row onto the screen. */
  reveal(index) {
    const top = this.above.getBoundingClientRect().top + index * this.height;
    if (top < 80 || top > innerHeight - 80) scrollTo(0, scrollY + top - innerHeight / 2);
    this.draw();
  }
}

function pad(columns) {
  const cell = el("td", { colspan: columns });
  const body = el("tbody.pad", { "aria-hidden": "true", hidden: true }, el("tr", cell));
  return body;
}

function setHeight(body, height) {
  const text = `${height}px`;
  const cell = body.firstElementChild.firstElementChild;
  if (cell.style.height !== text) cell.style.height = text;
  body.hidden = height === 0;
}
