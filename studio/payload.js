// Payloads, exactly as they are stored: the first 64 KB, the rest on demand; download and copy take the whole text.
// Indenting adds white space between tokens and changes none of them.

import { attempt, getResponse, getText, path } from "./api.js";
import { button, bytes, code, copyButton, dash, el, fill, iconButton, plainTable, skeleton } from "./dom.js";
import { differences, indented, members } from "./json.js";

const FIRST = 65_536; // characters
const SHORT = 90; // a payload that fits into a line is shown as that line
const MOST_ROWS = 500; // of a table of differences

/** The whole text of a payload: readPayload(runId, "step.output", stepId). */
export const readPayload = (runId, of, id = null) => getText(path`/runs/${runId}/payload`, { of, id });

const paint = ({ kind, text }) => (kind === "sign" || kind === "space" ? text : el(`span.j-${kind}`, text));

/** For people who decide: an object's members as names and values, line breaks as such. */
function readable(text) {
	return el("dl.readable", [...members(text)].map(([name, value]) => el("div", el("dt", name),
		el("dd", value.startsWith('"') ? JSON.parse(value) : /^[[{]/.test(value) ? code([...indented(value)].map(paint)) : value))));
}

function frame(title, text, { complete = true, size, whole, name, toRead = false }) {
	const pre = el("pre", { tabindex: 0, role: "region", "aria-label": title });
	const isObject = /^\s*\{/.test(text);
	const layouts = [toRead && isObject && ["Read", () => readable(text)], (toRead || text.length > SHORT) && /^\s*[[{]/.test(text) && ["Indented", () => [...indented(text)].map(paint)],
		["As stored", () => text]].filter(Boolean);
	let layout = 0;
	const draw = () => fill(pre, layouts[layout][1]());
	const next = () => layouts[(layout + 1) % layouts.length][0];
	const toggle = layouts.length > 1 && button(next(), () => {
		layout = (layout + 1) % layouts.length;
		fill(toggle, next());
		draw();
	}, "quiet");
	draw();
	return el("section.payload", el("header", el("h3", title), el("small", bytes(size)), toggle,
		iconButton("download", `Download ${title}`, () => download(whole, `${name}.json`)), copyButton(whole, `Copy ${title}`)), pre,
	!complete && el("p.more", `The first 64 KB of ${bytes(size)}. Download or copy it for the whole.`));
}

/** A payload that is here already, as text; toRead: laid out for people first. */
export const inlinePayload = (title, text, name, toRead = false) => frame(title, text, { size: new Blob([text]).size, whole: () => text, name, toRead });

/** A payload of a run, read when it is shown: payload("Output", runId, "step.output", stepId). */
export function payload(title, runId, of, id = null) {
	const box = el("div", skeleton(2));
	const whole = () => readPayload(runId, of, id);
	async function load() {
		try {
			const response = await getResponse(path`/runs/${runId}/payload`, { of, id, offset: 0, limit: FIRST });
			const text = await response.text();
			fill(box, frame(title, text, { complete: response.headers.get("x-tidebase-characters") <= FIRST, size: Number(response.headers.get("x-tidebase-bytes")), whole,
				name: [runId, of, id].filter(Boolean).join("-") }));
		} catch (error) {
			if (error.name !== "AbortError") fill(box, el("div.fault", `${title}: ${error.message}`, button("Try again", load)));
		}
	}
	load();
	return box;
}

/** Save a text as a file. */
export const download = (whole, name, type = "application/json") => attempt(async () => {
	const address = URL.createObjectURL(new Blob([await whole()], { type }));
	el("a", { href: address, download: name.replace(/[^\w.-]+/g, "_") }).click();
	setTimeout(() => URL.revokeObjectURL(address), 10_000);
});

/** A table of what differs between two JSON texts. */
export function diffTable(before, after) {
	const rows = differences(before, after);
	if (rows.length === 0) return el("p.muted", "The two are the same.");
	const side = (tag, text) => (text === null ? dash() : el(tag, text.slice(0, 2000)));
	return el("div.diff", plainTable(rows.slice(0, MOST_ROWS).map((row) => [row.path, side("del", row.before), side("ins", row.after)]), ["Path", "Before", "After"]),
		rows.length > MOST_ROWS && el("p.muted", `and ${rows.length - MOST_ROWS} more`));
}
