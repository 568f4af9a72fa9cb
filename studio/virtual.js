// Tables of many rows: only those near the screen are elements, two empty bodies stand for the rest.

import { el, syncRows } from "./dom.js";

const MARGIN = 12; // rows above and below the screen, so that scrolling by a little draws nothing

/** Keeps a table's rows, all of one height, in line with a list of any length; options: keyOf, make, update as of syncRows. */
export class VirtualRows {
	constructor(table, columns, options, signal) {
		const pad = () => el("tbody.pad", { "aria-hidden": "true" }, el("tr", el("td", { colspan: columns })));
		Object.assign(this, { options, items: [], body: el("tbody"), above: pad(), below: pad(), first: 0, height: 28, frame: null });
		table.append(this.above, this.body, this.below);
		const later = () => { this.frame ??= requestAnimationFrame(() => { this.frame = null; this.draw(); }); };
		addEventListener("scroll", later, { passive: true, signal });
		addEventListener("resize", later, { passive: true, signal });
	}

	set(items) {
		this.items = items;
		this.draw();
	}

	/** Where the list begins on the screen. */
	top() {
		return this.body.getBoundingClientRect().top - this.first * this.height;
	}

	draw() {
		const { body, items, options, height } = this;
		if (!body.isConnected) return;
		const first = Math.max(0, Math.min(items.length - 1, Math.floor(-this.top() / height)) - MARGIN);
		const last = Math.min(items.length, first + Math.ceil(innerHeight / height) + 2 * MARGIN);
		syncRows(body, items.slice(first, last), options.keyOf, options.make, options.update);
		this.first = first;
		for (const [pad, rows] of [[this.above, first], [this.below, items.length - last]]) {
			pad.hidden = rows === 0;
			pad.firstChild.firstChild.style.height = `${rows * height}px`;
		}
		if (this.measured === innerWidth || !body.firstChild) return;
		this.measured = innerWidth;
		this.height = body.firstChild.getBoundingClientRect().height;
		this.draw();
	}
}
