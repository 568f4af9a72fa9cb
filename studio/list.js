// What the list of runs asks the server for. This module needs api.js alone, so that the first answers are under way while
// the browser still reads the rest of the page.

import { get, query as toQuery } from "./api.js";

export const PAGE_SIZE = 50;
export const FILTERS = ["status", "workflow", "queue", "failureClass", "since", "until", "text", "errors", "parent"];

/** The filters of an address, and where in the list it is. */
export function readAddress(parameters) {
	const filters = Object.fromEntries([...parameters].filter(([name, value]) =>
		value && (FILTERS.includes(name) || name.startsWith("metadata."))));
	return [filters, { sort: parameters.get("sort"), before: parameters.get("before") }];
}

export const pageQuery = (filters, paging) => ({ ...filters, ...paging, view: "light", limit: PAGE_SIZE });
export const readPage = (...asked) => get("/runs", pageQuery(...asked));

/** Answers that are on their way, each for its first reader: the session, and the list when the page begins with it. */
export const early = { session: null, runs: null };
if (/^\/studio(\/runs)?\/?$/.test(location.pathname)) {
	early.session = get("/session");
	early.runs = readPage(...readAddress(new URLSearchParams(location.search)));
	for (const answer of Object.values(early)) answer.catch(() => {}); // who awaits it shows the failure
}
