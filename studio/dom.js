// Elements, text and formats: what every page of Studio is made of.
//
// el() is the only place where elements are made. It sets attributes and text, never markup, so that whatever a run, a
// step or a webhook is called stays text. Pages build their elements once; live updates change text nodes and rows in
// place (setText, syncRows), so that focus, selection and scroll position stay where they are.

const SVG = "http://www.w3.org/2000/svg";
const SVG_TAGS = new Set(["svg", "path", "rect", "line", "text", "g", "circle", "title"]);

/**
 * Make an element: el("button.primary", {onclick: save, disabled: false}, "Save"), or without attributes
 * el("td.num", 3). Attributes that are null or false are left out; functions are listeners, and a button with a listener
 * submits no form. Children may be nodes, strings, numbers, null or nested lists of those.
 */
export function el(selector, attributes, ...children) {
  const [tag, ...classes] = selector.split(".");
  const node = SVG_TAGS.has(tag) ? document.createElementNS(SVG, tag) : document.createElement(tag);
  if (classes.length) node.setAttribute("class", classes.join(" "));
  if (attributes?.constructor === Object) {
    for (const [name, value] of Object.entries(attributes)) {
      if (value === null || value === undefined || value === false) continue;
      if (typeof value === "function") node.addEventListener(name.slice(2), value);
      else if (name === "value" && "value" in node) node.value = value;
      else node.setAttribute(name, value === true ? "" : value);
    }
    if (tag === "button" && attributes.onclick) node.type = "button";
  } else children.unshift(attributes);
  append(node, children);
  return node;
}

function append(node, children) {
  for (const child of children.flat(Infinity)) {
    if (child !== null && child !== undefined && child !== false) node.append(child);
  }
}

/** Replace what is in a node. */
export function fill(node, ...children) {
  node.replaceChildren();
  append(node, children);
  return node;
}

/** Set a node's text only when it differs: an unchanged node keeps the reader's selection and costs no layout. */
export function setText(node, text) {
  text = String(text ?? "");
  if (node.textContent !== text) node.textContent = text;
}

export function show(node, visible) {
  if (node.hidden === visible) node.hidden = !visible;
}

/**
 * Bring the children of `parent` in line with `items`, keeping the node of each key.
 * make(item) returns a node; update(node, item) brings an existing or new one up to date.
 */
export function syncRows(parent, items, keyOf, make, update) {
  const nodes = new Map([...parent.children].map((node) => [node.dataset.key, node]));
  let next = parent.firstElementChild;
  for (const item of items) {
    const key = String(keyOf(item));
    let node = nodes.get(key);
    if (node) nodes.delete(key);
    else {
      node = make(item);
      node.dataset.key = key;
    }
    update?.(node, item);
    if (node === next) next = next.nextElementSibling;
    else parent.insertBefore(node, next);
  }
  for (const node of nodes.values()) node.remove();
}

// --- icons: drawn here, so that a status differs by its shape and not only by its colour

const ICONS = {
  pending: "M8 2.5a5.5 5.5 0 1 1 0 11 5.5 5.5 0 0 1 0-11",
  queued: "M8 2.5a5.5 5.5 0 1 1 0 11 5.5 5.5 0 0 1 0-11M8 5v3l2 1.5",
  running: "M8 2a6 6 0 1 1-6 6M5.8 8a2.2 2.2 0 1 0 4.4 0 2.2 2.2 0 0 0-4.4 0",
  waiting: "M8 2.5a5.5 5.5 0 1 1 0 11 5.5 5.5 0 0 1 0-11M6.4 6v4M9.6 6v4",
  completed: "M3 8.5 6.3 12 13 4.5",
  failed: "M4 4l8 8M12 4l-8 8",
  cancelled: "M8 2.5a5.5 5.5 0 1 1 0 11 5.5 5.5 0 0 1 0-11M4.2 4.2l7.6 7.6",
  stalled: "M8 2 14.5 13.5h-13zM8 6.5v3M8 11.4v.4",
  review: "M8 2 14.5 13.5h-13zM8 6.5v3M8 11.4v.4",
  runs: "M2 4h12M2 8h8M2 12h10",
  approvals: "M3 3h10v7H8l-3 3v-3H3z",
  queues: "M2 3h12v3H2zM2 8h12v2H2zM2 12h12v1.5H2z",
  schedules: "M2.5 4h11v9.5h-11zM2.5 7h11M5.5 2v3M10.5 2v3",
  costs: "M3 13.5V9M8 13.5V3M13 13.5V6.5",
  workers: "M3 3h10v7H3zM1.5 13h13M8 10v3",
  copy: "M5.5 5.5h8v8h-8zM3 10.5H2.5v-8h8V3",
  check: "M3 8.5 6.3 12 13 4.5",
  close: "M4 4l8 8M12 4l-8 8",
  search: "M7 2.5a4.5 4.5 0 1 1 0 9 4.5 4.5 0 0 1 0-9M10.5 10.5 14 14",
  download: "M8 2.5v7.5M4.8 7 8 10.2 11.2 7M3 13.5h10",
  chevron: "M6 3.5 10.5 8 6 12.5",
  clock: "M8 2.5a5.5 5.5 0 1 1 0 11 5.5 5.5 0 0 1 0-11M8 5v3l2 1.5",
};

export function icon(name, attributes = {}) {
  return el("svg", { class: `icon icon-${name}`, viewBox: "0 0 16 16", "aria-hidden": "true", ...attributes },
    el("path", { d: ICONS[name] ?? ICONS.pending }));
}

const STATUS_WORDS = {
  failed_retryable: "to be retried", manual_review: "in review", canceled: "expired", stalled: "stalled",
};

/** A status with its shape and colour; `kind` chooses both, the word is what is read. */
export function status(name, word = STATUS_WORDS[name] ?? name) {
  return el("span", { class: `status status-${name}` }, icon(STATUS_SHAPE[name] ?? name), el("span", word));
}

const STATUS_SHAPE = {
  failed_retryable: "queued", manual_review: "review", approved: "completed", rejected: "failed", canceled: "cancelled",
  delivered: "completed", paused: "waiting",
};

// --- time: one zone for the whole page, the whole instant on hover

const zoneListeners = new Set();
let zone = localStorage.getItem("tidebase.zone") === "utc" ? "UTC" : undefined;
let clockOffset = 0; // the server's clock minus this browser's, in milliseconds

export const zoneName = () => zone ?? Intl.DateTimeFormat().resolvedOptions().timeZone ?? "local";

export function switchZone() {
  zone = zone ? undefined : "UTC";
  localStorage.setItem("tidebase.zone", zone ? "utc" : "local");
  formats.clear();
  refreshTimes();
  for (const listener of zoneListeners) listener();
}

export function onZone(listener, signal) {
  zoneListeners.add(listener);
  signal?.addEventListener("abort", () => zoneListeners.delete(listener));
}

/** Now, by the server's clock: ages stay right when this computer's clock is wrong. */
export const now = () => Date.now() + clockOffset;

export const setServerTime = (iso) => { clockOffset = new Date(iso) - Date.now(); };

const formats = new Map();

function format(name, options) {
  if (!formats.has(name)) {
    formats.set(name, new Intl.DateTimeFormat("en-GB", { hourCycle: "h23", timeZone: zone, ...options }));
  }
  return formats.get(name);
}

const CLOCK = { hour: "2-digit", minute: "2-digit", second: "2-digit" };

/** "14:02:10" today, "24 Nov 14:02" this year, else with the year; in the page's zone. */
export function shortTime(iso) {
  const at = new Date(iso);
  const day = format("day", { year: "numeric", month: "short", day: "numeric" });
  const today = new Date(now());
  if (day.format(at) === day.format(today)) return format("clock", CLOCK).format(at);
  const sameYear = at.getUTCFullYear() === today.getUTCFullYear();
  return format(sameYear ? "date" : "long", {
    ...(sameYear ? {} : { year: "numeric" }), month: "short", day: "numeric", hour: "2-digit", minute: "2-digit",
  }).format(at).replace(",", "");
}

/** "14:02:10.123": for the waterfall and the event log, where milliseconds tell the order. */
export const preciseTime = (iso) => format("precise", { ...CLOCK, fractionalSecondDigits: 3 }).format(new Date(iso));

export function wholeInstant(iso) {
  const at = new Date(iso);
  const local = format("whole", {
    weekday: "short", year: "numeric", month: "short", day: "numeric", ...CLOCK, fractionalSecondDigits: 3,
  }).format(at);
  return `${local} (${zoneName()})\n${at.toISOString()}`;
}

/** "2.4 s", "12 s", "3 min 20 s", "2 h 5 min", "4 d 3 h". */
export function duration(milliseconds) {
  const ms = Math.max(0, milliseconds);
  if (ms < 1) return "0 ms";
  if (ms < 1000) return `${Math.round(ms)} ms`;
  if (ms < 9950) return `${(ms / 1000).toFixed(1)} s`;
  const seconds = Math.round(ms / 1000);
  if (seconds < 60) return `${seconds} s`;
  const parts = [[86400, "d"], [3600, "h"], [60, "min"], [1, "s"]];
  const first = parts.findIndex(([size]) => seconds >= size);
  const [size, unit] = parts[first];
  const [smaller, smallerUnit] = parts[first + 1];
  const rest = Math.floor((seconds % size) / smaller);
  return `${Math.floor(seconds / size)} ${unit}${rest ? ` ${rest} ${smallerUnit}` : ""}`;
}

export const ago = (iso) => {
  const ms = now() - new Date(iso);
  if (Math.abs(ms) < 1000) return "now";
  return ms > 0 ? `${coarse(ms)} ago` : `in ${coarse(-ms)}`;
};

const coarse = (ms) => duration(ms).replace(/^(\d+ (?:min|h|d)) .*/, "$1").replace(/^(\d+)\.\d s/, "$1 s");

// How each kind of time element writes itself; refreshTimes calls these again every second.
const TIME_KINDS = {
  ago: (iso) => ago(iso),
  short: (iso) => shortTime(iso),
  precise: (iso) => preciseTime(iso),
  since: (iso) => duration(now() - new Date(iso)),
};

/** A time that keeps itself up to date; kind is ago, short, precise or since (a running duration). */
export function time(iso, kind = "ago") {
  if (!iso) return el("span.none", "–");
  const node = el("time", { datetime: iso, "data-kind": kind });
  writeTime(node);
  return node;
}

function writeTime(node) {
  setText(node, TIME_KINDS[node.dataset.kind](node.dateTime));
  node.title = wholeInstant(node.dateTime);
}

function refreshTimes() {
  for (const node of document.querySelectorAll("time[data-kind]")) writeTime(node);
  for (const node of document.querySelectorAll("[data-zone]")) setText(node, zoneName());
}

setInterval(() => {
  if (document.hidden) return;
  for (const node of document.querySelectorAll("time[data-kind=ago], time[data-kind=since]")) {
    setText(node, TIME_KINDS[node.dataset.kind](node.dateTime));
  }
}, 1000);

// --- numbers

const grouped = new Intl.NumberFormat("en-US");
export const count = (number) => grouped.format(number);
export const plural = (number, one, many = `${one}s`) => `${count(number)} ${number === 1 ? one : many}`;

export function bytes(size) {
  if (size < 1000) return `${size} B`;
  return size < 1e6 ? `${(size / 1000).toFixed(1)} kB` : `${(size / 1e6).toFixed(1)} MB`;
}

/** Cents and up with two digits, less than that with as many as show it. */
export function money(usd) {
  if (usd === null || usd === undefined) return "–";
  const amount = Number(usd);
  if (amount === 0) return "$0";
  return amount >= 0.995 ? `$${grouped.format(Number(amount.toFixed(2)))}` : `$${Number(amount.toPrecision(3))}`;
}

export function compactCount(number) {
  if (number < 10_000) return count(number);
  return number < 1e6 ? `${(number / 1e3).toFixed(1)} k` : `${(number / 1e6).toFixed(2)} M`;
}

// --- small parts

/** Copy without the clipboard API too, which browsers withhold on plain HTTP. */
export async function copyText(text) {
  try {
    await navigator.clipboard.writeText(text);
    return true;
  } catch {
    const area = el("textarea.offscreen", { readonly: true, "aria-hidden": "true" });
    area.value = text;
    (document.querySelector("dialog[open]") ?? document.body).append(area);
    const focused = document.activeElement;
    area.select();
    const copied = document.execCommand("copy");
    area.remove();
    focused?.focus?.({ preventScroll: true });
    return copied;
  }
}

/** A button that copies; `text` is a string, or a function (async, too) that brings it. */
export function copyButton(text, label = "Copy", word = null) {
  const button = el("button", {
    class: word ? "quiet" : "bare", title: label, "aria-label": word ? null : label,
    async onclick(event) {
      event.stopPropagation();
      const copied = await copyText(typeof text === "function" ? await text() : text);
      button.firstChild.replaceWith(icon(copied ? "check" : "close"));
      announce(copied ? "Copied" : "Copying failed");
      setTimeout(() => button.firstChild.replaceWith(icon("copy")), 1200);
    },
  }, icon("copy"), word);
  return button;
}

/** An id, in full, beside a button that copies it. */
export const idText = (id) => el("span.id", el("code", id), copyButton(id, `Copy ${id}`));

const live = el("div.offscreen", { role: "status", "aria-live": "polite" });
const toasts = el("div.toasts", { role: "alert" });

/** Say something to a screen reader. */
export function announce(text) {
  if (!live.isConnected) document.body.append(live);
  live.textContent = text;
}

/** Show a short message at the edge of the page; errors stay until they are closed. */
export function toast(text, kind = "ok") {
  const box = document.querySelector("dialog[open]") ?? document.body; // a modal dialog makes the rest inert
  if (toasts.parentNode !== box) box.append(toasts);
  const note = el("div", { class: `toast toast-${kind}` }, el("span", text),
    el("button", { class: "bare", "aria-label": "Close message", onclick: () => note.remove() },
      icon("close")));
  toasts.append(note);
  if (kind !== "error") setTimeout(() => note.remove(), 4000);
}

/** Open a modal dialog; resolves to what its form was submitted with (a button's value), or "" when it was closed. */
export function dialog(title, content, { buttons = [], wide = false } = {}) {
  const form = el("form", { method: "dialog" },
    el("header", el("h2", title),
      el("button", { class: "bare", "aria-label": "Close", onclick: () => box.close("") },
        icon("close"))),
    el("div.dialog-body", content),
    buttons.length > 0 && el("footer", buttons));
  const box = el("dialog", { class: wide ? "wide" : null, "aria-label": title }, form);
  box.addEventListener("click", (event) => event.target === box && box.close(""));
  document.body.append(box);
  box.returnValue = "";
  box.showModal();
  return { box, form, closed: new Promise((resolve) => box.addEventListener("close", () => {
    if (toasts.parentNode === box) document.body.append(toasts);
    box.remove();
    resolve(box.returnValue);
  })) };
}

export function field(label, input, hint = null) {
  return el("label.field", el("span", label), input, hint && el("small", hint));
}

export function empty(title, ...details) {
  return el("div.empty", el("strong", title), details.length > 0 && el("p", details));
}

/** Rows of grey while the first answer is on its way; it appears only after a moment, so that quick answers do not flicker. */
export function skeleton(rows = 6) {
  return el("div.skeleton", { role: "status", "aria-label": "Loading" },
    Array.from({ length: rows }, () => el("i")));
}

export function debounce(action, milliseconds) {
  let timer;
  return (...values) => {
    clearTimeout(timer);
    timer = setTimeout(() => action(...values), milliseconds);
  };
}
