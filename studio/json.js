// JSON as text: cut, indented and compared without being parsed into numbers and objects, so that 1.10 stays 1.10,
// 12345678901234567890 keeps its last digit, and keys stay in their order.

const TOKEN = /"(?:[^"\\]+|\\.)*"?|[{}[\],:]|[^{}[\],:\s"]+/gs; // also of a text that is cut off
const opens = (token) => token === "{" || token === "[";
const closes = (token) => token === "}" || token === "]";

/** What a JSON object or array consists of: [key or index, value's text], in its order. */
export function* parts(text) {
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

/** The items of a JSON array, each as its text. */
export const items = (text) => [...parts(text)].map(([, value]) => value);

/** The text of one member, or of a member of a member: member(text, "gate", "data"); null when there is none. */
export const member = (text, ...path) =>
	path.reduce((whole, key) => new Map(parts(whole ?? "")).get(key) ?? null, text);

/** A JSON text in pieces [text, whether it is a key], with an indented text's white space between its tokens. */
export function indented(text) {
	const tokens = text.match(TOKEN) ?? [];
	const shown = [];
	let depth = 0;
	const add = (piece, isKey = false) => shown.push([piece, isKey]);
	const newLine = () => add(`\n${"  ".repeat(depth)}`);
	tokens.forEach((token, index) => {
		if (closes(token)) depth -= 1;
		if (closes(token) !== opens(tokens[index - 1])) newLine();
		add(token, tokens[index + 1] === ":");
		if (opens(token)) depth += 1;
		if (token === ",") newLine();
		if (token === ":") add(" ");
	});
	return shown;
}

function* leaves(text, path = "") {
	let some = false;
	for (const [key, value] of parts(text)) {
		some = true;
		yield* leaves(value, typeof key === "number" ? `${path}[${key}]` : path ? `${path}.${key}` : key);
	}
	if (!some) yield [path || "(value)", text.trim()];
}

/** What differs between two JSON texts: [[path, before, after]], null where a side has nothing. */
export function differences(before, after) {
	const [old, fresh] = [new Map(leaves(before)), new Map(leaves(after))];
	return [...new Map([...fresh, ...old]).keys()].map((path) => [path, old.get(path) ?? null, fresh.get(path) ?? null])
		.filter(([, was, is]) => was !== is);
}
