// Addresses of the page's views, and the server: requests, refusals, and streams of events, which are read with fetch,
// since EventSource cannot send the API key's header. Reads of a page are given up when it is left.

/** path`/runs/${id}/cancel`: its parts are escaped. */
export const path = (words, ...values) => String.raw({ raw: words }, ...values.map(encodeURIComponent));

export function query(values) {
	const set = Object.entries(values).filter(([, value]) => value !== null && value !== undefined && value !== "");
	return set.length ? `?${set.map((pair) => pair.map(encodeURIComponent).join("=")).join("&")}` : "";
}

// --- views

export const runUrl = (id, parameters = {}) => path`/studio/runs/${id}` + query(parameters);
export const runsUrl = (filters) => `/studio/runs${query(filters)}`;
export const compareUrl = (a, b) => `/studio/compare${query({ a, b })}`;
export const rememberScroll = () => history.replaceState({ ...history.state, scroll: scrollY }, "");

let open = () => {};
export const setOpener = (opener) => { open = opener; };

export function navigate(url, { replace = false } = {}) {
	if (!replace) rememberScroll();
	const { depth = 0 } = history.state ?? {};
	history[replace ? "replaceState" : "pushState"]({ depth: replace ? depth : depth + 1 }, "", url);
	open(0);
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

const KEY = "tidebase.key";

/** `status` 0: the server could not be reached. */
export class ApiError extends Error {
	constructor(status, body) {
		super(body.issues?.map((issue) => `${issue.path}: ${issue.message}`).join("; ")
			?? body.error ?? `the server answered ${status}`);
		this.status = status;
	}
}

export const unreachable = () => new ApiError(0, { error: "the server cannot be reached" });

export const session = { access: "full", key: sessionStorage.getItem(KEY), leaseMs: 60_000 };
export const canWrite = () => session.access === "full";

export function keepKey(key) {
	session.key = key;
	if (key) sessionStorage.setItem(KEY, key);
	else sessionStorage.removeItem(KEY);
}

export const watch = { onUnauthorized() {}, onReachable() {} };
let leaving = null;
export const setPageSignal = (signal) => { leaving = signal; };

async function send(method, url, { body, signal, accept = "application/json", key = session.key } = {}) {
	const headers = { accept };
	if (key) headers.authorization = `Bearer ${key}`;
	if (body !== undefined) headers["content-type"] = "application/json";
	if (typeof body === "object") body = JSON.stringify(body);
	let response;
	try {
		response = await fetch(url, { method, headers, signal, cache: "no-store", body });
	} catch (error) {
		if (error.name === "AbortError") throw error;
		watch.onReachable(false);
		throw unreachable();
	}
	watch.onReachable(true);
	if (response.ok) return response;
	if (response.status === 401 && key === session.key) watch.onUnauthorized();
	throw new ApiError(response.status, await response.json().catch(() => ({})));
}

export const getResponse = (url, parameters = {}, options = {}) =>
	send("GET", url + query(parameters), { signal: leaving, ...options });
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

const RETRY_MS = [300, 1000, 2000, 5000];
const STALE_MS = 20_000; // without a connection
const SILENT_MS = 40_000; // the server says something every 15 s: after so long the connection is dead

/** Follow a run's events. onEvents gets what came at once, [{seq, text}]; onState how fresh they are, in a word. */
export async function follow(runId, after, onEvents, onState, signal) {
	let failures = 0;
	let lostAt = null;
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
			lostAt = null;
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
		lostAt ??= Date.now();
		onState(Date.now() - lostAt > STALE_MS ? "stale" : "reconnecting");
		await pause(RETRY_MS[failures] ?? RETRY_MS.at(-1));
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

// --- the list of runs: asked for here, before the other modules have come

export const PAGE_SIZE = 50;
export const FILTERS = ["status", "workflow", "queue", "failureClass", "since", "until", "text", "errors", "parent"];

export function readAddress(parameters) {
	const filters = Object.fromEntries([...parameters].filter(([name, value]) =>
		value && (FILTERS.includes(name) || name.startsWith("metadata."))));
	return [filters, { sort: parameters.get("sort"), before: parameters.get("before") }];
}

export const pageQuery = (filters, paging) => ({ ...filters, ...paging, view: "light", limit: PAGE_SIZE });
export const readPage = (...asked) => get("/runs", pageQuery(...asked));

/** Answers on their way, each for its first reader. */
export const early = { session: null, runs: null };
if (/^\/studio(\/runs)?\/?$/.test(location.pathname)) {
	early.session = get("/session");
	early.runs = readPage(...readAddress(new URLSearchParams(location.search)));
	for (const answer of Object.values(early)) answer.catch(() => {}); // who reads it shows the failure
}
