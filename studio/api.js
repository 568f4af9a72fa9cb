// Addresses of the page's views, and the server: requests, refusals, and streams of events, which are read with fetch,
// since EventSource cannot send the API key's header. Reads of a page are given up when it is left.

/** path`/runs/${id}/cancel`: its parts are escaped. */
export const path = (words, ...values) => String.raw({ raw: words }, ...values.map(encodeURIComponent));

export function query(values) {
	const set = Object.entries(values).filter(([, value]) => (value ?? "") !== "");
	return set.length ? `?${new URLSearchParams(set)}` : "";
}

// --- views

export const runUrl = (id, parameters = {}) => path`/studio/runs/${id}` + query(parameters);
export const runsUrl = (filters) => `/studio/runs${query(filters)}`;
export const compareUrl = (a, b) => `/studio/compare${query({ a, b })}`;

/** What studio.js, the frame around the pages, is told; and `signal`, which ends the reads of the page that is open. */
export const frame = { open() {}, onReachable() {}, onUnauthorized() {}, signal: null };

/** Where the reader was comes back with the page: the scroll position, and the row that had the focus. */
export const rememberPlace = () => history.replaceState({ ...history.state, scroll: scrollY,
	row: document.activeElement?.closest("[data-key]")?.dataset.key }, "");

export function navigate(url) {
	rememberPlace();
	history.pushState({ depth: (history.state.depth ?? 0) + 1 }, "", url);
	return frame.open();
}

export const goBack = () => (history.state?.depth ? history.back() : navigate("/studio/runs"));

/** Null takes a parameter out. The view is not opened again. */
export function setQuery(changes) {
	const url = new URL(location.href);
	for (const [name, value] of Object.entries(changes)) {
		url.searchParams[value === null ? "delete" : "set"](name, value);
	}
	history.replaceState(history.state, "", url);
}

let title = "";
let waiting = 0;

export function setTitle(text) {
	title = text;
	document.title = `${waiting ? `(${waiting}) ` : ""}${title} · Tidebase`;
}

export function setWaiting(count) {
	if (count === waiting) return;
	waiting = count;
	setTitle(title);
	document.querySelector("link[rel=icon]").href = `/studio/icon.svg${query({ n: count || null })}`;
}

// --- requests

/** `status` 0: the server could not be reached. */
export class ApiError extends Error {
	constructor(status, body) {
		super(body.issues?.map((issue) => `${issue.path}: ${issue.message}`).join("; ")
			?? body.error ?? `the server answered ${status}`);
		this.status = status;
	}
}

export const KEY = "tidebase.key"; // in the storage of this tab
export const session = { access: "full", key: sessionStorage.getItem(KEY), leaseMs: 60_000 };
export const canWrite = () => session.access === "full";

async function send(method, url, { body, signal, accept = "application/json", key = session.key } = {}) {
	const headers = { accept, "content-type": "application/json" };
	if (key) headers.authorization = `Bearer ${key}`;
	if (typeof body === "object") body = JSON.stringify(body);
	let response;
	try {
		response = await fetch(url, { method, headers, signal, cache: "no-store", body });
	} catch (error) {
		if (error.name === "AbortError") throw error;
		frame.onReachable(false);
		throw new ApiError(0, { error: "the server cannot be reached" });
	}
	frame.onReachable(true);
	if (response.ok) return response;
	if (response.status === 401 && key === session.key) frame.onUnauthorized();
	throw new ApiError(response.status, await response.json().catch(() => ({})));
}

export const getResponse = (url, parameters = {}, options = {}) =>
	send("GET", url + query(parameters), { signal: frame.signal, ...options });
export const getText = async (...asked) => (await getResponse(...asked)).text();
export const get = async (...asked) => (await getResponse(...asked)).json();
export const postText = async (url, body, options = {}) => (await send("POST", url, { body, ...options })).text();
export const post = async (url, body = {}, options = {}) => JSON.parse(await postText(url, body, options));
export const put = (url, body) => send("PUT", url, { body });
export const remove = (url) => send("DELETE", url);

/** Let the browser draw and take input. */
export const breathe = (milliseconds = 0) => new Promise((resolve) => setTimeout(resolve, milliseconds));

export async function readPages(url, name, parameters, take) {
	for (let { after } = parameters, more = true; more; more = after) {
		const answer = await get(url, { ...parameters, after });
		await breathe();
		take(answer[name]);
		after = answer.nextCursor;
	}
}

/** A refusal is left to the next try. All else is a fault of this page. */
export function laterAgain(error) {
	if (!(error instanceof ApiError) && error.name !== "AbortError") throw error;
}

// --- what goes on by itself, while the tab is visible

/** Ends early when the tab is hidden or shown, or somebody decided something. */
const pause = (milliseconds) => new Promise((resolve) => {
	const listening = new AbortController();
	const end = () => {
		listening.abort();
		clearTimeout(timer);
		resolve();
	};
	const timer = setTimeout(end, milliseconds);
	for (const name of ["visibilitychange", "decided"]) document.addEventListener(name, end, { signal: listening.signal });
});

export async function every(load, milliseconds, signal) {
	while (!signal.aborted) {
		await pause(milliseconds);
		if (!signal.aborted && !document.hidden) await load().catch(laterAgain);
	}
}

/** Now, too; a failure of that is the caller's. */
export async function poll(load, milliseconds, signal) {
	try {
		await load();
	} finally {
		every(load, milliseconds, signal);
	}
}

const STALE_AFTER = 7; // tries, in 20 s
const SILENT_MS = 40_000; // the server says something every 15 s: after so long the connection is dead

/** Follow a run's events. onEvents gets what came at once, [{seq, text}]; onState how fresh they are, in a word. */
export async function follow(runId, after, onEvents, onState, signal) {
	let failures = 0;
	while (!signal.aborted) {
		if (document.hidden) {
			onState("paused");
			await pause(SILENT_MS);
			continue;
		}
		const connection = new AbortController();
		const close = () => connection.abort();
		let silence = setTimeout(close, SILENT_MS);
		document.addEventListener("visibilitychange", close, { signal: connection.signal });
		try {
			const { body } = await getResponse(path`/runs/${runId}/events`, { after, view: "light" },
				{ signal: AbortSignal.any([connection.signal, signal]), accept: "text/event-stream" });
			failures = 0;
			onState("live");
			for await (const events of eventsIn(body)) {
				clearTimeout(silence);
				silence = setTimeout(close, SILENT_MS);
				const news = events.filter(({ seq }) => seq > after);
				if (news.length === 0) continue;
				after = news.at(-1).seq;
				onEvents(news);
			}
		} catch (error) {
			laterAgain(error);
			if (error.status === 404 || error.status === 401) return onState("not live");
		} finally {
			clearTimeout(silence);
			close();
		}
		if (signal.aborted || document.hidden) continue;
		onState(failures > STALE_AFTER ? "stale" : "reconnecting");
		await pause(Math.min(5000, 300 * 2 ** failures));
		failures += 1;
	}
}

async function* eventsIn(body) {
	const reader = body.pipeThrough(new TextDecoderStream()).getReader();
	for (let rest = ""; ;) {
		const { value, done } = await reader.read().catch(() => ({ done: true })); // the connection broke
		if (done) return;
		const blocks = (rest + value).split("\n\n");
		rest = blocks.pop();
		yield blocks.map((block) => /^id: (\d+)\ndata: (.*)$/m.exec(block)).filter(Boolean)
			.map(([, seq, text]) => ({ seq: Number(seq), text }));
	}
}
