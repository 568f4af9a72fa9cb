// Payloads, exactly as they are stored: the first 64 KB, the rest on demand; download and copy take the whole text.
// Indenting adds white space between tokens and changes none of them.

import { getResponse, getText, path, query } from "./api.js";
import { bytes, copyButton, el, fill, icon, skeleton, toast } from "./dom.js";
import { differences, indented, tokens } from "./json.js";

const FIRST = 65_536; // characters
const SHORT = 90; // a payload that fits into a line is shown as that line

/** Where a payload is read: payloadUrl(runId, "step.output", stepId). */
export const payloadUrl = (runId, of, id = null, limit = null) =>
  path`/runs/${runId}/payload` + query({ of, id, ...(limit && { offset: 0, limit }) });

export const readPayload = (runId, of, id, options) => getText(payloadUrl(runId, of, id), options);

/** JSON as coloured text; `layout` is "indented" or "stored". */
export function jsonText(text, layout = text.length > SHORT ? "indented" : "stored") {
  const parts = [];
  if (layout === "stored") {
    let at = 0;
    for (const token of tokens(text)) {
      const start = text.indexOf(token.text, at);
      if (start > at) parts.push(text.slice(at, start));
      parts.push(paint(token));
      at = start + token.text.length;
    }
    parts.push(text.slice(at));
  } else {
    for (const token of indented(text)) parts.push(paint(token));
  }
  const merged = []; // one text node for neighbours: signs and white space are most of a payload
  for (const part of parts) {
    if (typeof part === "string" && typeof merged.at(-1) === "string") merged[merged.length - 1] += part;
    else merged.push(part);
  }
  return merged;
}

const paint = ({ kind, text }) => (kind === "sign" || kind === "space" ? text : el("span", { class: `j-${kind}` }, text));

/** A payload that is here already, as text. */
export function inlinePayload(title, text, name = title) {
  return frame(title, text, { complete: true, size: new Blob([text]).size, whole: () => text, name });
}

/** A payload of a run, read when it is shown: payload("Output", runId, "step.output", {id, size}). */
export function payload(title, runId, of, { id = null, size = null } = {}) {
  const box = el("div", skeleton(2));
  const name = [runId, of, id].filter(Boolean).join("-").replace(/[^\w.-]+/g, "_");
  const whole = () => readPayload(runId, of, id);
  async function load() {
    try {
      const response = await getResponse(payloadUrl(runId, of, id, FIRST));
      const text = await response.text();
      const total = Number(response.headers.get("x-tidebase-bytes") ?? size);
      const characters = Number(response.headers.get("x-tidebase-characters") ?? text.length);
      fill(box, frame(title, text, { complete: characters <= FIRST, size: total, whole, name }));
    } catch (error) {
      fill(box, el("div.fault", `${title}: ${error.message}`,
        el("button", { onclick: load }, "Try again")));
    }
  }
  load();
  return box;
}

function frame(title, text, { complete, size, whole, name }) {
  const pre = el("pre", { tabindex: 0, role: "region", "aria-label": title });
  let layout = text.length > SHORT ? "indented" : "stored";
  const draw = () => fill(pre, jsonText(text, layout));
  const toggle = el("button", { class: "quiet", onclick() {
    layout = layout === "stored" ? "indented" : "stored";
    fill(toggle, layout === "stored" ? "Indent" : "As stored");
    draw();
  } }, layout === "stored" ? "Indent" : "As stored");
  draw();
  return el("section.payload",
    el("header", el("h3", title), el("small", bytes(size)), text.length > SHORT && /^\s*[[{]/.test(text) && toggle,
      el("button", { class: "bare", title: `Download ${title}`, "aria-label": `Download ${title}`,
        onclick: () => download(whole, `${name}.json`) }, icon("download")),
      copyButton(whole, `Copy ${title}`)),
    pre,
    !complete && el("p.more", `The first 64 KB of ${bytes(size)}. Download or copy it for the whole.`));
}

/** Save a text as a file; blob: addresses need no place in the Content-Security-Policy when they are downloaded. */
export async function download(whole, name, type = "application/json") {
  try {
    const address = URL.createObjectURL(new Blob([await whole()], { type }));
    const link = el("a", { href: address, download: name });
    link.click();
    setTimeout(() => URL.revokeObjectURL(address), 10_000);
  } catch (error) {
    toast(error.message, "error");
  }
}

const MOST_ROWS = 500;

/** A table of what differs between two JSON texts. */
export function diffTable(before, after) {
  const rows = differences(before, after);
  if (rows.length === 0) return el("p.muted", "The two are the same.");
  const side = (tag, text) => el("td", text === null ? el("span.none", "–") : el(tag, {}, clipped(text)));
  return el("div.table-wrap",
    el("table.diff",
      el("thead", el("tr", ["Path", "Before", "After"].map((word) => el("th", word)))),
      el("tbody", rows.slice(0, MOST_ROWS).map((row) => el("tr", el("td", row.path),
        side("del", row.before), side("ins", row.after))))),
    rows.length > MOST_ROWS && el("p.muted", `and ${rows.length - MOST_ROWS} more`));
}

const clipped = (text) => (text.length > 2000 ? `${text.slice(0, 2000)}…` : text);
