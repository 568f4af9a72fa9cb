// The server: requests, refusals, and a run's event stream.
//
// The API key lives in this tab's session storage and is sent as a header, by streams too (they are read with fetch, not
// with EventSource, which can send none). Without a key nothing is sent.

const KEY = "tidebase.key";

/** A refusal of the server; `status` 0: it could not be reached. */
export class ApiError extends Error {
  constructor(status, body) {
    super(body.error ?? `the server answered ${status}`);
    Object.assign(this, { status, code: body.code ?? null, body });
  }
}

export const session = { access: "full", key: sessionStorage.getItem(KEY) };
export const canWrite = () => session.access === "full";

export function keepKey(key) {
  session.key = key;
  if (key) sessionStorage.setItem(KEY, key);
  else sessionStorage.removeItem(KEY);
}

const connection = new EventTarget(); // "change" with detail {reachable, since}: what the banner shows
let unreachableSince = null;

export const onConnection = (listener) => connection.addEventListener("change", (event) => listener(event.detail));

function noteReachable(reachable) {
  if (reachable === (unreachableSince === null)) return;
  unreachableSince = reachable ? null : Date.now();
  connection.dispatchEvent(new CustomEvent("change", { detail: { reachable, since: unreachableSince } }));
}

let onUnauthorized = () => {};
export const setUnauthorized = (listener) => { onUnauthorized = listener; };

const encode = encodeURIComponent;

/** A path with its parts escaped: path`/runs/${id}/cancel`. */
export const path = (words, ...values) => String.raw({ raw: words }, ...values.map((value) => encode(value)));

/** A query string of what is set; lists repeat their key. */
export function query(values) {
  const parts = Object.entries(values).flatMap(([name, value]) =>
    [value].flat().filter((one) => one !== null && one !== undefined && one !== "")
      .map((one) => `${encode(name)}=${encode(one)}`));
  return parts.length ? `?${parts.join("&")}` : "";
}

async function send(method, url, { body, signal, headers = {}, key = session.key } = {}) {
  const fields = { accept: "application/json", ...headers };
  if (key) fields.authorization = `Bearer ${key}`;
  // A string is JSON already: a payload that somebody typed goes out as it was typed.
  const data = body === undefined ? undefined : typeof body === "string" ? body : JSON.stringify(body);
  if (data !== undefined) fields["content-type"] = "application/json";
  let response;
  try {
    response = await fetch(url, { method, headers: fields, body: data, signal, cache: "no-store" });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    noteReachable(false);
    throw new ApiError(0, { error: "the server cannot be reached" });
  }
  noteReachable(true);
  if (response.ok) return response;
  let refusal;
  try {
    refusal = await response.json();
  } catch {
    refusal = { error: `the server answered ${response.status} ${response.statusText}` };
  }
  if (response.status === 401 && key === session.key) onUnauthorized();
  throw new ApiError(response.status, refusal);
}

/** The answer's text, exactly as it came. */
export const getText = async (url, options) => (await send("GET", url, options)).text();
export const getResponse = (url, options) => send("GET", url, options);
export const get = async (url, options) => (await send("GET", url, options)).json();
export async function post(url, body = {}, options = {}) {
  const response = await send("POST", url, { ...options, body });
  return options.asText ? response.text() : response.json();
}
export const put = async (url, body, options = {}) => (await send("PUT", url, { ...options, body })).json();
export const remove = async (url, options) => (await send("DELETE", url, options)).json();

const RETRY_MS = [300, 1000, 2000, 5000];
const STALE_MS = 20_000; // this long without a connection, the page says that it is stale
const SILENT_MS = 40_000; // the server says something every 15 s: after this long the connection is dead

/**
 * Follow a stream of server-sent events while the tab is visible: closed when it is hidden, resumed by number.
 *
 * @param {(after: number) => string} urlOf where to resume after the event with this number
 * @param {number} after the last event that is known already
 * @param {(events: {seq: number, text: string}[]) => void} onEvents all that came at once, in order
 * @param {(state: "live"|"reconnecting"|"stale"|"paused"|"ended") => void} onState
 * @param {AbortSignal} signal ends it
 */
export function follow(urlOf, after, onEvents, onState, signal) {
  let attempt = null; // the connection under way
  let failures = 0;
  let lostAt = null;
  let timer;

  async function connect() {
    clearTimeout(timer);
    if (signal.aborted || document.hidden || attempt) return;
    const mine = attempt = new AbortController();
    let silence;
    const heard = () => {
      clearTimeout(silence);
      silence = setTimeout(() => mine.abort(), SILENT_MS);
    };
    try {
      heard();
      const response = await send("GET", urlOf(after), {
        signal: AbortSignal.any([mine.signal, signal]), headers: { accept: "text/event-stream" },
      });
      failures = 0;
      lostAt = null;
      onState("live");
      await read(response.body, heard);
    } catch (error) {
      if (error.status === 404 || error.status === 401) return onState("ended");
    } finally {
      clearTimeout(silence);
      if (attempt === mine) attempt = null;
    }
    if (!signal.aborted && !document.hidden) reconnect();
  }

  async function read(body, heard) {
    const reader = body.pipeThrough(new TextDecoderStream()).getReader();
    let rest = "";
    for (;;) {
      const { value, done } = await reader.read();
      if (done) return;
      heard();
      const blocks = (rest + value).split("\n\n");
      rest = blocks.pop();
      const events = blocks.map(parse).filter((event) => event && event.seq > after);
      if (events.length) {
        after = events.at(-1).seq;
        onEvents(events);
      }
    }
  }

  function reconnect() {
    lostAt ??= Date.now();
    onState(Date.now() - lostAt > STALE_MS ? "stale" : "reconnecting");
    timer = setTimeout(connect, RETRY_MS[Math.min(failures, RETRY_MS.length - 1)]);
    failures += 1;
  }

  function onVisibility() {
    if (!document.hidden) return connect();
    clearTimeout(timer);
    attempt?.abort();
    attempt = null;
    onState("paused");
  }

  document.addEventListener("visibilitychange", onVisibility, { signal });
  signal.addEventListener("abort", () => clearTimeout(timer));
  connect();
}

function parse(block) {
  let seq = null;
  const data = [];
  for (const line of block.split("\n")) {
    if (line.startsWith("id:")) seq = Number(line.slice(3));
    else if (line.startsWith("data:")) data.push(line.slice(5).trimStart());
  }
  return data.length ? { seq, text: data.join("\n") } : null;
}

/**
 * Call `load` now and every so many milliseconds while the tab is visible, one at a time, and at once when the tab is
 * shown again. `load` gets an AbortSignal. Returns a function that loads at once.
 */
export function poll(load, milliseconds, signal) {
  let timer;
  let running = null;
  async function tick() {
    clearTimeout(timer);
    if (signal.aborted || document.hidden) return;
    running ??= Promise.resolve(load(signal)).finally(() => { running = null; });
    try {
      await running;
    } catch (error) {
      if (error.name !== "AbortError" && !(error instanceof ApiError)) throw error;
    }
    clearTimeout(timer);
    if (!signal.aborted) timer = setTimeout(tick, milliseconds);
  }
  document.addEventListener("visibilitychange", tick, { signal });
  signal.addEventListener("abort", () => clearTimeout(timer));
  return tick;
}
