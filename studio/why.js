// Why a run does not go on, in one line, in the page's own time zone and with times that keep running.

import { duration, el, plural, time } from "./dom.js";
import { runUrl } from "./router.js";

const at = (iso) => time(iso, "short");
const since = (iso) => time(iso, "since");
const strong = (text) => el("strong", text);
const link = (id) => el("a", { href: runUrl(id), title: id }, el("code", shortId(id)));
const joined = (nodes) => nodes.flatMap((node, index) => (index ? [", ", node] : [node]));

const LINES = {
  running: (d) => ["claimed by ", strong(d.worker), ", heartbeat ", time(d.heartbeatAt, "ago"),
    d.step ? [", in step ", strong(d.step), " for ", since(d.stepSince)] : ", between steps"],
  queue_capped: (d) => ["queue ", strong(d.queue), ` is at its cap of ${d.concurrency}: `, joined(d.runs.map(link)),
    d.holders > d.runs.length && ` and ${d.holders - d.runs.length} more`, d.runs.length === 1 ? " holds it" : " hold it"],
  rate_limited: (d) => ["rate limit, next place ", time(d.until, "ago")],
  paused: (d) => ["queue ", strong(d.queue), " is paused"],
  retry: (d) => ["again at ", at(d.until), `, attempt ${d.attempt} of ${d.maxAttempts}`,
    d.error && [", after ", strong(d.error.name ?? d.error.message ?? d.error)]],
  scheduled: (d) => ["starts at ", at(d.until)],
  offered: (d) => ["offered to the app ", time(d.since, "ago"), ", again at ", at(d.until)],
  gate: (d) => ["waits for a person since ", since(d.since), d.prompt && [": ", strong(d.prompt)]],
  signal: (d) => ["waits for signal ", strong(d.signal), d.n > 1 && ` (number ${d.n})`, d.until && [", until ", at(d.until)]],
  sleep: (d) => ["sleeps until ", at(d.until)],
  children: (d) => [`waits for ${d.live} of ${plural(d.total, "child", "children")}`],
  lease_expired: (d) => ["its lease ran out ", time(d.since, "ago"), "; nobody has begun it again"],
  nobody_asks: (d) => ["nobody has asked queue ", strong(d.queue), " for work ",
    d.lastAskedAt ? ["since ", time(d.lastAskedAt, "ago")] : "in the last 5 min"],
  workflow_unknown: (d) => ["workers ask queue ", strong(d.queue), ", but none for workflow ", strong(d.workflowName)],
  ready: (d) => ["ready since ", since(d.since), ": the next claim of queue ", strong(d.queue), " takes it, when its turn has come"],
  pending: (d) => ["created ", time(d.since, "ago"), "; nobody has begun it"],
};

/** The line as nodes, and its plain text for a title; null when the run has ended. */
export function whyNodes(run) {
  if (!run.whyDetail) return run.why ? [run.why] : null;
  const line = LINES[run.whyDetail.kind];
  return line ? line(run.whyDetail) : [run.why];
}

/** What to say of any run in one line: why it waits, or how it ended. */
export function outcome(run) {
  const nodes = whyNodes(run);
  if (nodes) return nodes;
  if (run.status === "failed") {
    return [el("span.error-text", errorLine(run.error) ?? "failed"),
      run.failureClass && [" ", el("span.tag", run.failureClass)]];
  }
  if (run.status === "cancelled") {
    return ["cancelled", run.cancelActor && ` by ${run.cancelActor}`, run.cancelReason && `: ${run.cancelReason}`];
  }
  return null;
}

export function errorLine(error) {
  if (!error) return null;
  if (typeof error !== "object") return String(error);
  return [error.name, error.message].filter((part) => typeof part === "string" && part).join(": ") || null;
}

/** The end of a long id: ids begin with the time they were made, so that those of one hour begin alike. */
export const shortId = (id) => (id.length > 20 ? `…${id.slice(-8)}` : id);

export const shownStatus = (run) => (run.stalled ? "stalled" : run.status);

/** How long a run took, or takes so far, from its creation. */
export const runDuration = (run) => (run.completedAt ? duration(run.durationMs ?? 0) : run.status === "running" ? time(run.createdAt, "since") : null);
