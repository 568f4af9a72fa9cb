// Payloads, exactly as they are stored: JSON is cut, indented and compared as text, so that 1.10 stays 1.10,
// 12345678901234567890 keeps its last digit, and keys stay in their order.

import { getResponse, getText, path } from "./api.js";
import { button, bytes, code, copyButton, dash, el, fill, iconButton, loading, muted, plainTable
	} from "./dom.js";

// --- JSON as text

const TOKEN = /"(?:[^"\\]+|\\.)*"?|[{}[\],:]|[^{}[\],:\s"]+/gs; // also of a text that is cut off
const opens = (token) => token === "{" || token === "[";
const closes = (token) => token === "}" || token === "]";

/** What an object or array consists of: [key or index, value's text]. */
function* parts(text) {
	let depth = 0;
	let key = 0;
	let [start, end] = [null, 0];
	for (const { 0: token, index } of text.matchAll(TOKEN)) {
		if (closes(token)) depth -= 1;
		if (depth === (token === "," ? 1 : closes(token) ? 0 : -1)) {
			if (start !== null) yield [key, text.slice(start, end)];
			if (typeof key === "number") key += 1;
			start = null;
		} else if (depth === 1 && token === ":") {
			key = JSON.parse(text.slice(start, end));
			start = null;
		} else if (depth > 0) start ??= index;
		if (opens(token)) depth += 1;
		end = index + token.length;
	}
}

export const items = (text) => [...parts(text)].map(([, value]) => value);

/** The text of a member, or of its member: member(text, "gate", "data"); null when there is none. */
export const member = (text, ...names) =>
	names.reduce((whole, name) => new Map(parts(whole ?? "")).get(name) ?? null, text);

function indented(text) {
	const tokens = text.match(TOKEN) ?? [];
	const shown = [];
	let depth = 0;
	const newLine = () => shown.push(`\n${"  ".repeat(depth)}`);
	tokens.forEach((token, index) => {
		if (closes(token)) depth -= 1;
		if (closes(token) !== opens(tokens[index - 1])) newLine();
		shown.push(tokens[index + 1] === ":" ? el("span.key", token) : token);
		if (opens(token)) depth += 1;
		if (token === ",") newLine();
		if (token === ":") shown.push(" ");
	});
	return shown;
}

function* leaves(text, place = "") {
	let some = false;
	for (const [key, value] of parts(text)) {
		some = true;
		yield* leaves(value, typeof key === "number" ? `${place}[${key}]` : place ? `${place}.${key}` : key);
	}
	if (!some) yield [place || "(value)", text.trim()];
}

const MOST_ROWS = 500;

export function diffTable(before, after) {
	const [old, fresh] = [new Map(leaves(before)), new Map(leaves(after))];
	const places = [...new Map([...fresh, ...old]).keys()].filter((place) => old.get(place) !== fresh.get(place));
	if (places.length === 0) return muted("The two are the same.");
	const side = (name, text) => (text === undefined ? dash() : el(name, text.slice(0, 2000)));
	const shown = places.slice(0, MOST_ROWS).map((place) =>
		[place, side("del", old.get(place)), side("ins", fresh.get(place))]);
	return el("div.diff", plainTable(shown, ["Path", "Before", "After"]),
		places.length > MOST_ROWS && muted(`and ${places.length - MOST_ROWS} more`));
}

// --- a payload on the page

const FIRST = 65_536; // characters
const SHORT = 90; // characters, which need no indenting

export const readPayload = (runId, of, id = null) => getText(path`/runs/${runId}/payload`, { of, id });

/** For people who decide: names and values, line breaks as such. */
const readable = (text) => el("dl.readable", [...parts(text)].map(([name, value]) => el("div", el("dt", name),
	el("dd", readableValue(name, value)))));

function readableValue(name, value) {
	if (!value.startsWith('"')) return /^[[{]/.test(value) ? code(indented(value)) : value;
	return name === "stack" ? code(JSON.parse(value)) : JSON.parse(value);
}

function frame(title, text, { complete = true, size, whole, name, toRead = false }) {
	const pre = el("pre", { tabindex: 0, role: "region", label: title });
	const layouts = [
		toRead && /^\s*\{/.test(text) && ["Read", readable],
		(toRead || text.length > SHORT) && /^\s*[[{]/.test(text) && ["Indented", indented],
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

/** A text that is here already. */
export const inlinePayload = (title, text, name, toRead = false) =>
	frame(title, text, { size: new Blob([text]).size, whole: () => text, name, toRead });

export const payload = (title, runId, of, id = null, toRead = false) => loading(async (box) => {
	const response = await getResponse(path`/runs/${runId}/payload`, { of, id, offset: 0, limit: FIRST });
	const size = (unit) => Number(response.headers.get(`x-tidebase-${unit}`));
	fill(box, frame(title, await response.text(), { complete: size("characters") <= FIRST, size: size("bytes"),
		whole: () => readPayload(runId, of, id), name: [runId, of, id].filter(Boolean).join("-"), toRead }));
}, 2);

export async function download(whole, name, type = "application/json") {
	const address = URL.createObjectURL(new Blob([await whole()], { type }));
	el("a", { href: address, download: name.replace(/[^\w.-]+/g, "_") }).click();
	setTimeout(() => URL.revokeObjectURL(address), 10_000);
}

// --- JSON that somebody types

export const jsonInput = (name, attributes = {}) => el("textarea", {
	name, spellcheck: "false", autocapitalize: "off", rows: 4, ...attributes, oninput({ target }) {
		try {
			if (target.value.trim()) JSON.parse(target.value);
			target.setCustomValidity("");
		} catch (error) {
			target.setCustomValidity(`This is not JSON: ${error.message}`);
		}
	} });

/** A body whose payloads go out as they were typed. */
export function bodyOf(values, payloads = {}) {
	const texts = { ...payloads };
	for (const [name, value] of Object.entries(values)) texts[name] = (value ?? "") === "" ? null : JSON.stringify(value);
	const members = Object.entries(texts).filter(([, text]) => text?.trim());
	return `{${members.map(([name, text]) => `"${name}":${text}`).join(",")}}`;
}
