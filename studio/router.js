// Addresses: every view has a URL of its own, made with pushState, so that it can be shared, reloaded and gone back to.

import { query } from "./api.js";

let open = () => {};
export const setOpener = (opener) => { open = opener; };

export const runUrl = (id, parameters = {}) => `/studio/runs/${encodeURIComponent(id)}${query(parameters)}`;
export const runsUrl = (filters) => `/studio/runs${query(filters)}`;
export const compareUrl = (first, second) => `/studio/compare${query({ a: first, b: second })}`;
export const rememberScroll = () => history.replaceState({ ...history.state, scroll: scrollY }, "");

/** Go to another view. The scroll position of this one is kept for the way back. */
export function navigate(url, { replace = false } = {}) {
	if (!replace) rememberScroll();
	const { depth = 0 } = history.state ?? {};
	history[replace ? "replaceState" : "pushState"]({ depth: replace ? depth : depth + 1 }, "", url);
	open(0);
}

/** One view back, or to the list when this one was opened by itself. */
export const goBack = () => (history.state?.depth ? history.back() : navigate("/studio/runs"));

/** Change parameters of this view's address in place: null takes one out. The view is not opened again. */
export function setQuery(changes) {
	const url = new URL(location.href);
	for (const [name, value] of Object.entries(changes)) {
		url.searchParams[value === null ? "delete" : "set"](name, value);
	}
	history.replaceState(history.state, "", url);
}

let title = "";
let waiting = 0;

/** The tab's title, with the number of decisions that wait for a person before it. */
export function setTitle(text) {
	title = text;
	document.title = `${waiting ? `(${waiting}) ` : ""}${title} · Tidebase`;
}

export function setWaiting(count) {
	if (count === waiting) return;
	waiting = count;
	setTitle(title);
	document.querySelector("link[rel=icon]").href = `/studio/icon.svg${count ? `?n=${count}` : ""}`;
}
