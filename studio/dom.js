// Elements, times and numbers: what every page is made of. el() alone makes elements, and sets attributes and text,
// never markup. Live updates change texts, rows and cells in place: focus, selection and scroll position stay.

import { laterAgain } from "./api.js";

const SVG_TAGS = new Set(["svg", "path", "rect", "line", "text", "title"]);

/** el("button.primary", {onclick: save}, "Save"), el("td.num", 3). Null and false are left out, label is aria-label. */
export function el(selector, attributes, ...children) {
	const [tag, ...classes] = selector.split(".");
	const node = SVG_TAGS.has(tag) ? document.createElementNS("http://www.w3.org/2000/svg", tag)
		: document.createElement(tag);
	if (classes.length) node.setAttribute("class", classes.join(" "));
	if (attributes?.constructor !== Object) return add(node, [attributes, children]);
	for (const [name, value] of Object.entries(attributes)) {
		if (isNothing(value)) continue;
		if (typeof value === "function") node.addEventListener(name.slice(2), value);
		else if (name === "style") Object.assign(node.style, value);
		else if (name === "value" && "value" in node) node.value = value;
		else node.setAttribute(name === "label" ? "aria-label" : name, value === true ? "" : value);
	}
	return add(node, children);
}

const isNothing = (value) => (value ?? false) === false;

function add(node, children) {
	node.append(...children.flat(Infinity).filter((child) => !isNothing(child)));
	return node;
}

export function fill(node, ...children) {
	node.replaceChildren();
	return add(node, children);
}

export function setText(node, text) {
	const shown = String(text ?? "");
	if (node.textContent !== shown) node.textContent = shown; // else the reader's selection would be lost
}

export const show = (node, visible) => { node.hidden = !visible; };

export const setState = (node, name, on) => node.setAttribute(`aria-${name}`, String(Boolean(on)));

/** Act when what a node is made from is not what it was. */
export function once(node, source, action) {
	const text = JSON.stringify(source);
	if (node.source === text) return;
	node.source = text;
	action();
}

// --- tables

/** Bring the children of `parent` in line with `items`, by key. */
export function syncRows(parent, items, keyOf, make, update) {
	const nodes = new Map([...parent.children].map((node) => [node.dataset.key, node]));
	let next = parent.firstElementChild;
	for (const item of items) {
		const key = String(keyOf(item));
		let node = nodes.get(key);
		if (!nodes.delete(key)) {
			node = make(item);
			node.dataset.key = key;
		}
		update(node, item);
		if (node === next) next = next.nextElementSibling;
		else parent.insertBefore(node, next);
	}
	for (const node of nodes.values()) node.remove();
}

export const plainTable = (rows, heads = null) => el("div.table-wrap", el("table",
	heads && el("thead", el("tr", heads.map((word) => el("th", word)))),
	el("tbody", rows.map((cells) => el("tr", cells.map((cell) => (cell?.tagName === "TD" ? cell : el("td", cell))))))));

const cellOf = (item, cell) => (cell.call ? cell(item) : cell.endsWith("At") ? time(item[cell]) : item[cell]);

/**
 * A live table of columns [head, cell, class?]; `cell` is a function of the item, or the name of its member, which is a
 * time when it ends in At. set(items) replaces only the cells that look different. On a narrow screen a row is a list.
 */
export function grid(key, columns, nothing = null, { kind = "stacked", onRow } = {}) {
	columns = columns.filter(Boolean);
	const body = el("tbody");
	const heads = columns.map(([word, , name]) => el("th", { class: name }, word));
	const table = el(`table.${kind}`, el("thead", el("tr", heads)), body);
	const element = el("div.card.table-wrap");
	const update = (row, item) => {
		once(row, item, () => {
			row.item = Object.assign(row.item ?? {}, item); // the buttons of cells that stay act on it
			columns.forEach(([word, cell, name], index) => {
				const made = el("td", { class: name, "data-label": word }, cellOf(row.item, cell));
				const old = row.children[index];
				if (!old) row.append(made);
				else if (!made.isEqualNode(old)) old.replaceWith(made);
			});
		});
		onRow?.(row, item);
	};
	return Object.assign(element, { set(items) {
		const { activeElement } = document;
		if (!items.length) fill(element, nothing);
		else if (!table.isConnected) fill(element, table);
		syncRows(body, items, (item) => item[key], () => el("tr"), update);
		if (activeElement.isConnected && activeElement !== document.activeElement) { // its row was moved
			activeElement.focus({ preventScroll: true });
		}
	} });
}

const MARGIN = 12; // rows above and below the screen

/** Rows of one height: those near the screen are elements, an empty body above and one below stand for the rest. */
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
			show(node, rows);
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
	function set(list) {
		items = list;
		draw();
	}

	/** Scroll to an item and give it the focus. */
	function reveal(item) {
		if (!items.includes(item)) return;
		scrollBy(0, body.getBoundingClientRect().top + (items.indexOf(item) - first) * height - innerHeight / 2);
		draw();
		[...body.children].find((node) => node.dataset.key === keyOf(item))?.querySelector("[data-row]")
			.focus({ preventScroll: true });
	}

	return { draw, set, reveal };
}

// --- icons: a status differs by its shape and not only by its colour

const RING = "M8 2.5a5.5 5.5 0 1 1 0 11 5.5 5.5 0 0 1 0-11";
const ICONS = { queued: `${RING}M8 5v3l2 1.5`, waiting: `${RING}M6.4 6v4M9.6 6v4`, cancelled: `${RING}M4.2 4.2l7.6 7.6`,
	running: "M8 2a6 6 0 1 1-6 6M5.8 8a2.2 2.2 0 1 0 4.4 0 2.2 2.2 0 0 0-4.4 0", completed: "M3 8.5 6.3 12 13 4.5",
	failed: "M4 4l8 8M12 4l-8 8", stalled: "M8 2 14.5 13.5h-13zM8 6.5v3M8 11.4v.4", runs: "M2 4h12M2 8h8M2 12h10",
	approvals: "M3 3h10v7H8l-3 3v-3H3z", queues: "M2 3h12v3H2zM2 8h12v2H2zM2 12h12v1.5H2z",
	schedules: "M2.5 4h11v9.5h-11zM2.5 7h11M5.5 2v3M10.5 2v3", costs: "M3 13.5V9M8 13.5V3M13 13.5V6.5",
	workers: "M3 3h10v7H3zM1.5 13h13M8 10v3", copy: "M5.5 5.5h8v8h-8zM3 10.5H2.5v-8h8V3", chevron: "M6 3.5 10.5 8 6 12.5",
	search: "M7 2.5a4.5 4.5 0 1 1 0 9 4.5 4.5 0 0 1 0-9M10.5 10.5 14 14",
	download: "M8 2.5v7.5M4.8 7 8 10.2 11.2 7M3 13.5h10",
};
const LOOKS_LIKE = { failed_retryable: "queued", clock: "queued", paused: "waiting", approved: "completed",
	delivered: "completed", rejected: "failed", close: "failed", canceled: "cancelled", manual_review: "stalled" };

export const icon = (name) => el("svg.icon", { viewBox: "0 0 16 16", "aria-hidden": "true" },
	el("path", { d: ICONS[LOOKS_LIKE[name] ?? name] ?? RING }));

const STATUS_WORDS = { failed_retryable: "to be retried", manual_review: "in review", canceled: "expired" };

export const status = (name, word = STATUS_WORDS[name] ?? name) =>
	el(`span.status.is-${name}`, icon(name), el("span", word));

// --- times: one zone for the whole page, the whole instant on hover

let inUtc = localStorage.getItem("tidebase.zone") === "utc"; // else this computer's zone
let clockOffset = 0; // the server's clock minus this computer's, in ms: ages stay right when this one is wrong

const zoneName = () => (inUtc ? "UTC" : Intl.DateTimeFormat().resolvedOptions().timeZone);

export function zoneButton() {
	const name = el("span", zoneName());
	return button([icon("clock"), name], () => {
		inUtc = !inUtc;
		localStorage.setItem("tidebase.zone", inUtc ? "utc" : "local");
		document.querySelectorAll("time").forEach(writeTime);
		setText(name, zoneName());
	}, "quiet", { title: "Show times in UTC or in this computer's zone" });
}

export const setServerTime = (iso) => { clockOffset = new Date(iso) - Date.now(); };

export const now = () => Date.now() + clockOffset;

/** "Wed, 25 Nov 2026 14:02:10.123"; without Intl, whose first use takes 30 ms. */
function written(at) {
	const local = new Date(inUtc ? at : at - at.getTimezoneOffset() * 6e4);
	return `${local.toUTCString().slice(0, 25)}.${local.toISOString().slice(20, 23)}`;
}

function shortTime(at) {
	const [text, today] = [written(at), written(new Date(now()))];
	if (text.slice(0, 16) === today.slice(0, 16)) return text.slice(17, 25);
	return text.slice(12, 16) === today.slice(12, 16) ? `${text.slice(5, 11)} ${text.slice(17, 22)}` : text.slice(5, 22);
}

export const wholeInstant = (at) => `${written(new Date(at))} (${zoneName()})\n${new Date(at).toISOString()}`;

const UNITS = [[86400, "d"], [3600, "h"], [60, "min"], [1, "s"]];

/** "12 ms", "2.4 s", "3 min 20 s", "4 d 3 h". */
export function duration(milliseconds) {
	const ms = Math.max(0, milliseconds);
	if (ms < 1000) return `${Math.round(ms)} ms`;
	if (ms < 9950) return `${(ms / 1000).toFixed(1)} s`;
	let rest = Math.round(ms / 1000);
	const parts = UNITS.map(([size, unit]) => {
		const whole = Math.floor(rest / size);
		rest %= size;
		return whole && `${whole} ${unit}`;
	});
	const first = parts.findIndex(Boolean);
	return parts.slice(first, first + 2).filter(Boolean).join(" ");
}

export const between = (from, to) => duration(new Date(to) - new Date(from));

function ago(at) {
	const seconds = (now() - at) / 1000;
	const [size, unit] = UNITS.find(([one]) => Math.abs(seconds) >= one) ?? [];
	const words = `${Math.floor(Math.abs(seconds) / size)} ${unit}`;
	return !unit ? "now" : seconds > 0 ? `${words} ago` : `in ${words}`;
}

const TIME_KINDS = {
	ago, short: shortTime, precise: (at) => written(at).slice(17), since: (at) => duration(now() - at),
};

/** A time (ISO, or in ms) that keeps itself up to date. */
export const time = (at, kind = "ago") =>
	(at ? writeTime(el("time", { datetime: new Date(at).toISOString(), "data-kind": kind })) : dash());

function writeTime(node) {
	setText(node, TIME_KINDS[node.dataset.kind](new Date(node.dateTime)));
	return node;
}

// only for what somebody points at: a list has many times
document.addEventListener("mouseover", ({ target }) => {
	if (target.dateTime) target.title = wholeInstant(target.dateTime);
	else if (target.describe) target.title = target.describe();
});

setInterval(() => {
	if (!document.hidden) document.querySelectorAll("time[data-kind=ago], time[data-kind=since]").forEach(writeTime);
}, 1000);

// --- numbers

export const count = (number, more = false) =>
	`${String(number).replace(/\B(?=(\d{3})+(?!\d))/g, ",")}${more ? "+" : ""}`;
export const plural = (number, one, many = `${one}s`) => `${count(number)} ${number === 1 ? one : many}`;

export const compactCount = (number) => (number < 1e4 ? count(number)
	: number.toLocaleString("en-US", { notation: "compact", maximumFractionDigits: 1 }));

export const bytes = (size) => (size < 1000 ? `${size} B`
	: size < 1e6 ? `${(size / 1000).toFixed(1)} kB` : `${(size / 1e6).toFixed(1)} MB`);

export function money(usd) {
	const amount = Number(usd ?? 0);
	return `$${amount < 0.0995 ? Number(amount.toPrecision(2)) : count(amount.toFixed(2))}`;
}

// --- small parts

export const code = (text) => el("code", text);
export const strong = (...children) => el("strong", children);
export const muted = (...children) => el("span.muted", children);
export const row = (...children) => el("div.row", children);
export const number = (...children) => el("td.num", children);
export const dash = (word = "–") => el("span.none", word);
export const tag = (word) => el("span.tag", word);
export const link = (href, ...children) => el("a.link", { href }, children);
export const errorText = (text = "") => el("p.error-text", { role: "alert" }, text);

export const button = (word, onclick, kind = "", attributes = {}) =>
	el(`button${kind && `.${kind}`}`, { type: "button", onclick, ...attributes }, word);
export const iconButton = (name, label, onclick, attributes = {}) =>
	button(icon(name), onclick, "bare", { title: label, label, ...attributes });

export const field = (label, entry, hint = null) =>
	el("label.field", el("span", label), entry, hint && el("small", hint));
export const fields = (...entries) => el("div.fields", entries);
export const input = (name, attributes = {}) => el("input", { name, ...attributes });
export const heading = (title, ...aside) => el("header.spread", el("h1", title), aside);
export const empty = (title, ...details) => el("div.empty", strong(title), el("p", details));
export const card = (title, aside, ...body) =>
	el("section.card", el("header", el("h2", title), aside), el("div.body.stack", body));

export const logo = (size) => el("img", { src: "/studio/icon.svg", alt: "", width: size });

/** Names and values; what is missing is left out. */
export const facts = (values) => el("dl.facts", Object.entries(values)
	.filter(([, value]) => !isNothing(value) && value !== "" && value.className !== "none")
	.map(([name, value]) => el("div", el("dt", name), el("dd", value))));

export const meter = (part) => el("div.meter", { style: { width: `${100 * part}%` } });

export function meters(title, rows) {
	const most = Math.max(...rows.map(([, cost]) => cost), 1e-12);
	return card(title, null, plainTable(rows.map(([name, cost]) => [name, number(money(cost)),
		el("td.half", meter(cost / most))])));
}

export const skeleton = () => el("p.muted.skeleton", { role: "status" }, "Loading …");

/** again() is called by its button, and once the server can be reached again. */
export function fault(error, again) {
	const box = el("div.body.fault.is-failed", { role: "alert" }, strong("This could not be loaded"),
		el("p", error.message), again && button("Try again", again));
	document.addEventListener("reachable", () => box.isConnected && again?.(), { once: true });
	return box;
}

/** A box that load(box) fills; a failure of its first reading is shown. */
export function loading(load) {
	const box = el("div.stack", skeleton());
	const again = async () => {
		try {
			await load(box);
		} catch (error) {
			laterAgain(error);
			if (error.name !== "AbortError" && box.querySelector(".skeleton, .fault")) fill(box, fault(error, again));
		}
	};
	again();
	return Object.assign(box, { again });
}

export const searchInput = (placeholder, label, action, attributes = {}) => el("div.search", icon("search"),
	input(null, { type: "search", placeholder, label, oninput: ({ target }) => action?.(target.value),
		...attributes }));

export const checkbox = (label, onchange, attributes) =>
	input(null, { type: "checkbox", label, onchange, ...attributes });
export const options = (choices) => choices.map(([value, word]) => el("option", { value }, word));
export const select = (label, choices, onchange, attributes) =>
	el("select", { label, onchange, ...attributes }, options(choices));

export function setMark(mark, state) {
	mark.className = `mark is-${state}`;
	setText(mark, state);
}

/** Browsers withhold the clipboard API on plain HTTP. */
async function copyText(text) {
	try {
		await navigator.clipboard.writeText(text);
		return true;
	} catch {
		const area = el("textarea.offscreen", { readonly: true, "aria-hidden": "true", value: text });
		const focused = document.activeElement;
		foreground().append(area);
		area.select();
		const copied = document.execCommand("copy");
		area.remove();
		focused?.focus({ preventScroll: true });
		return copied;
	}
}

export const copyButton = (text, label, word = null) => button([icon("copy"), word], async () => {
	const copied = await copyText(typeof text === "function" ? await text() : text);
	toast(copied ? "Copied." : "Copying failed.", copied ? "completed" : "failed");
}, word ? "quiet" : "bare", { title: label, label: word ? null : label });

export const idText = (id, shown = id) => el("span.id", code(shown), copyButton(id, `Copy ${id}`));

const toasts = el("div.toasts", { role: "alert" });
const foreground = () => document.querySelector("dialog[open]") ?? document.body; // all else is inert

export function toast(text, kind = "completed") {
	const note = el(`div.spread.toast.is-${kind}`, el("span", text),
		iconButton("close", "Close message", () => note.remove()));
	foreground().append(toasts);
	toasts.append(note);
	if (kind !== "failed") setTimeout(() => note.remove(), 4000);
}

/** `closed` resolves to the value of the button that submitted the form, or "". */
export function dialog(title, content, ...buttons) {
	const form = el("form", { method: "dialog" },
		el("header.spread", el("h2", title), iconButton("close", "Close", () => box.close(""))),
		el("div.body", content), buttons.length > 0 && el("footer.row", buttons));
	const box = el("dialog", { label: title, onclick: (event) => event.target === box && box.close("") }, form);
	document.body.append(box);
	box.showModal();
	box.querySelector(".body :is(input, select, textarea), footer button")?.focus();
	const closed = new Promise((resolve) => box.addEventListener("close", () => {
		box.remove();
		resolve(box.returnValue);
	}));
	return { form, closed };
}

/** Resolves to the values of the form, or to null. What is dangerous has a way out. */
export async function ask(title, content, word, wayOut = null) {
	const { form, closed } = dialog(title, content,
		wayOut && el("button", { value: "", formnovalidate: true }, wayOut),
		el(wayOut ? "button.danger" : "button.primary", { value: "go" }, word));
	return (await closed) === "go" ? Object.fromEntries(new FormData(form)) : null;
}

export function debounce(action, milliseconds) {
	let timer;
	return (...values) => {
		clearTimeout(timer);
		timer = setTimeout(() => action(...values), milliseconds);
	};
}
