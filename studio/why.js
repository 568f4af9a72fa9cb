// Why a run does not go on, in one line, in the page's own time zone and with times that keep running.

import { code, dash, duration, el, plural, strong, time } from "./dom.js";
import { runUrl } from "./router.js";

const at = (iso) => time(iso, "short");
const since = (iso) => time(iso, "since");

/** The end of a long id: ids begin with the time they were made, so those of one hour begin alike. */
export const shortId = (id) => (id.length > 20 ? `…${id.slice(-8)}` : id);
const link = (id, index) => [index > 0 && ", ", el("a", { href: runUrl(id), title: id }, code(shortId(id)))];

const LINES = {
	running: (d) => ["claimed by ", strong(d.worker), ", heartbeat ", time(d.heartbeatAt), d.step ? [", in step ", strong(d.step), " for ", since(d.stepSince)] : ", between steps"],
	queue_capped: (d) => ["queue ", strong(d.queue), ` is at its cap of ${d.concurrency}: `, d.runs.map(link),
		d.holders > d.runs.length && ` and ${d.holders - d.runs.length} more`, d.holders === 1 ? " holds it" : " hold it"],
	rate_limited: (d) => ["rate limit, next place ", time(d.until)],
	paused: (d) => ["queue ", strong(d.queue), " is paused"],
	retry: (d) => ["again at ", at(d.until), `, attempt ${d.attempt} of ${d.maxAttempts}`, d.error && [", after ", strong(d.error.name ?? d.error.message ?? d.error)]],
	scheduled: (d) => ["starts at ", at(d.until)],
	offered: (d) => ["offered to the app ", time(d.since), ", again at ", at(d.until)],
	gate: (d) => ["waits for a person since ", since(d.since), d.prompt && [": ", strong(d.prompt)]],
	signal: (d) => ["waits for signal ", strong(d.signal), d.n > 1 && ` (number ${d.n})`, d.until && [", until ", at(d.until)]],
	sleep: (d) => ["sleeps until ", at(d.until)],
	children: (d) => [`waits for ${d.live} of ${plural(d.total, "child", "children")}`],
	lease_expired: (d) => ["its lease ran out ", time(d.since), "; nobody has begun it again"],
	nobody_asks: (d) => ["nobody has asked queue ", strong(d.queue), " for work ", d.lastAskedAt ? ["since ", at(d.lastAskedAt)] : "in the last 5 min"],
	workflow_unknown: (d) => ["workers ask queue ", strong(d.queue), ", but none for workflow ", strong(d.workflowName)],
	ready: (d) => ["ready since ", since(d.since), ": the next claim of queue ", strong(d.queue), " takes it, when its turn has come"],
	pending: (d) => ["created ", time(d.since), "; nobody has begun it"],
};

/** What to say of a run in one line: why it waits, or how it ended; null when it completed. */
export function outcome(run) {
	if (run.whyDetail) return LINES[run.whyDetail.kind]?.(run.whyDetail) ?? run.why;
	if (run.status === "failed") return [el("span.error-text", errorLine(run.error) || "failed"), run.failureClass && [" ", el("span.tag", run.failureClass)]];
	if (run.status === "cancelled") return ["cancelled", run.cancelActor && ` by ${run.cancelActor}`, run.cancelReason && `: ${run.cancelReason}`];
	return run.why ?? null;
}

/** "TimeoutError: too slow", of whatever was recorded as an error. */
export function errorLine(error) {
	if (typeof error !== "object" || !error) return error ? String(error) : "";
	return [error.name, error.message].filter((part) => typeof part === "string" && part).join(": ");
}

export const shownStatus = (run) => (run.stalled ? "stalled" : run.status);

/** How long a run took, or takes so far, from its creation. */
export const runDuration = (run) => (run.completedAt ? duration(run.durationMs ?? 0) : run.status === "running" ? time(run.createdAt, "since") : dash());
