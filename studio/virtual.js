// Tables of many rows: only those near the screen are elements, two empty bodies stand for the rest.

import { el, syncRows } from "./dom.js";

const MARGIN = 12; // rows above and below the screen, so that scrolling by a little draws nothing

/** Keep a table's rows, all of one height, in line with a list of any length; with keyOf, make, update as syncRows. */
export function virtualRows(table, columns, { keyOf, make, update }, signal) {
	const pad = () => el("tbody.pad", { "aria-hidden": "true" }, el("tr", el("td", { colspan: columns })));
	const [above, body, below] = [pad(), el("tbody"), pad()];
	let items = [];
	let first = 0;
	let height = 28; // of a row, until one was measured at this width
	let measuredAt = 0;
	let frame = null;
	table.append(above, body, below);

	function draw() {
		frame = null;
		if (!body.isConnected) return;
		const top = body.getBoundingClientRect().top - first * height;
		first = Math.max(0, Math.min(items.length - 1, Math.floor(-top / height)) - MARGIN);
		const last = Math.min(items.length, first + Math.ceil(innerHeight / height) + 2 * MARGIN);
		syncRows(body, items.slice(first, last), keyOf, make, update);
		for (const [node, rows] of [[above, first], [below, items.length - last]]) {
			node.hidden = rows === 0;
			node.firstChild.firstChild.style.height = `${rows * height}px`;
		}
		if (measuredAt === innerWidth || !body.firstChild) return;
		measuredAt = innerWidth;
		height = body.firstChild.getBoundingClientRect().height;
		draw();
	}

	for (const name of ["scroll", "resize"]) {
		addEventListener(name, () => { frame ??= requestAnimationFrame(draw); }, { passive: true, signal });
	}
	return { draw, set(list) {
		items = list;
		draw();
	} };
}
