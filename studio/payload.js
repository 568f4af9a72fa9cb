// Payloads, exactly as they are stored: the first 64 KB, the rest on demand; download and copy take the whole text.
// Indenting adds white space between tokens and changes none of them.

import { getResponse, getText, path } from "./api.js";
import { attempt, button, bytes, code, copyButton, dash, el, fill, iconButton, loading, muted, plainTable } from
	"./dom.js";
import { differences, indented, parts } from "./json.js";

const FIRST = 65_536; // characters
const SHORT = 90; // characters that fit into a line, which needs no indenting
const MOST_ROWS = 500; // of a table of differences

/** The whole text of a payload: readPayload(runId, "step.output", stepId). */
export const readPayload = (runId, of, id = null) => getText(path`/runs/${runId}/payload`, { of, id });

const painted = (text) => indented(text).map(([piece, isKey]) => (isKey ? el("span.key", piece) : piece));

/** For people who decide: an object's members as names and values, line breaks as such. */
const readable = (text) => el("dl.readable", [...parts(text)].map(([name, value]) => el("div", el("dt", name),
	el("dd", value.startsWith('"') ? JSON.parse(value) : /^[[{]/.test(value) ? code(painted(value)) : value))));

function frame(title, text, { complete = true, size, whole, name, toRead = false }) {
	const pre = el("pre", { tabindex: 0, role: "region", "aria-label": title });
	const layouts = [
		toRead && /^\s*\{/.test(text) && ["Read", readable],
		(toRead || text.length > SHORT) && /^\s*[[{]/.test(text) && ["Indented", painted],
		["As stored", (stored) => stored],
	].filter(Boolean);
	const toggle = layouts.length > 1 && button("", turn, "quiet");
	function turn() {
		const [, layout] = layouts[0];
		layouts.push(layouts.shift());
		fill(pre, layout(text));
		if (toggle) fill(toggle, layouts[0][0]);
	}
	turn();
	return el("section.payload", el("header", el("h3", title), el("small", bytes(size)), toggle,
		iconButton("download", `Download ${title}`, () => download(whole, `${name}.json`)),
		copyButton(whole, `Copy ${title}`)),
	pre, !complete && el("p.more", `The first 64 KB of ${bytes(size)}. Download or copy it for the whole.`));
}

/** A payload that is here already, as text; toRead: laid out for people first. */
export const inlinePayload = (title, text, name, toRead = false) =>
	frame(title, text, { size: new Blob([text]).size, whole: () => text, name, toRead });

/** A payload of a run, read when it is shown: payload("Output", runId, "step.output", stepId). */
export const payload = (title, runId, of, id = null) => loading(async (box) => {
	const response = await getResponse(path`/runs/${runId}/payload`, { of, id, offset: 0, limit: FIRST });
	const size = (unit) => Number(response.headers.get(`x-tidebase-${unit}`));
	fill(box, frame(title, await response.text(), { complete: size("characters") <= FIRST, size: size("bytes"),
		whole: () => readPayload(runId, of, id), name: [runId, of, id].filter(Boolean).join("-") }));
}, 2);

/** Save a text as a file. */
export const download = (whole, name, type = "application/json") => attempt(async () => {
	const address = URL.createObjectURL(new Blob([await whole()], { type }));
	el("a", { href: address, download: name.replace(/[^\w.-]+/g, "_") }).click();
	setTimeout(() => URL.revokeObjectURL(address), 10_000);
});

/** A table of what differs between two JSON texts. */
export function diffTable(before, after) {
	const rows = differences(before, after);
	if (rows.length === 0) return muted("The two are the same.");
	const side = (name, text) => (text === null ? dash() : el(name, text.slice(0, 2000)));
	const shown = rows.slice(0, MOST_ROWS).map(([name, was, is]) => [name, side("del", was), side("ins", is)]);
	return el("div.diff", plainTable(shown, ["Path", "Before", "After"]),
		rows.length > MOST_ROWS && muted(`and ${rows.length - MOST_ROWS} more`));
}
