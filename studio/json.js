// JSON as text: cut, indented and compared without being parsed into numbers and objects, so that 1.10 stays 1.10,
// 12345678901234567890 keeps its last digit, and keys stay in their order.

const SPACE = /[ \t\n\r]*/y;
const SCALAR = /[^,\]}\s]+/y;

function skipSpace(text, at) {
	SPACE.lastIndex = at;
	SPACE.test(text);
	return SPACE.lastIndex;
}

function endOfString(text, at) {
	for (let end = text.indexOf('"', at + 1); end >= 0; end = text.indexOf('"', end + 1)) {
		let slashes = 0;
		while (text[end - 1 - slashes] === "\\") slashes += 1;
		if (slashes % 2 === 0) return end + 1;
	}
	return text.length;
}

function endOfValue(text, at) {
	if (text[at] === '"') return endOfString(text, at);
	if (text[at] !== "{" && text[at] !== "[") {
		SCALAR.lastIndex = at;
		return SCALAR.test(text) ? SCALAR.lastIndex : text.length;
	}
	for (let depth = 0; at < text.length; at += 1) {
		const sign = text[at];
		if (sign === '"') at = endOfString(text, at) - 1;
		else if (sign === "{" || sign === "[") depth += 1;
		else if ((sign === "}" || sign === "]") && (depth -= 1) === 0) return at + 1;
	}
	return text.length;
}

/** The members of a JSON object as [key, value's text], in their order. */
export function* members(text) {
	let at = skipSpace(text, skipSpace(text, 0) + 1);
	while (at < text.length && text[at] !== "}") {
		const keyEnd = endOfString(text, at);
		const start = skipSpace(text, skipSpace(text, keyEnd) + 1);
		const end = endOfValue(text, start);
		yield [JSON.parse(text.slice(at, keyEnd)), text.slice(start, end)];
		at = skipSpace(text, end);
		if (text[at] === ",") at = skipSpace(text, at + 1);
	}
}

/** The items of a JSON array, each as its text. */
export function* items(text) {
	let at = skipSpace(text, skipSpace(text, 0) + 1);
	while (at < text.length && text[at] !== "]") {
		const end = endOfValue(text, at);
		yield text.slice(at, end);
		at = skipSpace(text, end);
		if (text[at] === ",") at = skipSpace(text, at + 1);
	}
}

/** The text of one member, or of a member of a member: member(text, "gate", "data"); null when there is none. */
export function member(text, ...path) {
	for (const key of path) {
		let found = null;
		if (/^\s*\{/.test(text)) {
			for (const [name, value] of members(text)) if (name === key) found = value;
		}
		if (found === null) return null;
		text = found;
	}
	return text;
}

const TOKEN = /[{}[\],:]|[^{}[\],:\s"]+/y;

/** The tokens of a JSON text, also of one that is cut off, with an indented text's white space between them: {kind, text}. */
export function* indented(text) {
	let depth = 0;
	let opened = false; // the last token opened a list or object
	const line = () => ({ kind: "space", text: `\n${"  ".repeat(Math.max(0, depth))}` });
	for (let at = skipSpace(text, 0), end; at < text.length; at = skipSpace(text, end)) {
		TOKEN.lastIndex = at;
		end = text[at] === '"' ? endOfString(text, at) : at + TOKEN.exec(text)[0].length;
		const token = text.slice(at, end);
		const closes = token === "}" || token === "]";
		if (closes) depth -= 1;
		if (closes !== opened) yield line();
		opened = token === "{" || token === "[";
		if (opened) depth += 1;
		const isString = token[0] === '"';
		yield { kind: isString ? (text[skipSpace(text, end)] === ":" ? "key" : "string") : /^[-\d]/.test(token) ? "number" : /^\w/.test(token) ? "word" : "sign", text: token };
		if (token === ",") yield line();
		if (token === ":") yield { kind: "space", text: " " };
	}
}

function* leaves(text, path) {
	const first = text.trimStart()[0];
	let some = false;
	if (first === "{") {
		for (const [key, value] of members(text)) {
			some = true;
			yield* leaves(value, path ? `${path}.${key}` : key);
		}
	} else if (first === "[") {
		let index = 0;
		for (const item of items(text)) {
			some = true;
			yield* leaves(item, `${path}[${index}]`);
			index += 1;
		}
	}
	if (!some) yield [path || "(value)", text.trim()];
}

/** What differs between two JSON texts: [{path, before, after}], null where a side has nothing. */
export function differences(before, after) {
	const old = new Map(leaves(before, ""));
	const rows = [];
	for (const [path, value] of leaves(after, "")) {
		const was = old.get(path) ?? null;
		if (was !== value) rows.push({ path, before: was, after: value });
		old.delete(path);
	}
	for (const [path, value] of old) rows.push({ path, before: value, after: null });
	return rows;
}
