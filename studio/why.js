// Why a run does not go on, in one line, in the page's own time zone and with times that keep running.

import { dash, duration, el, strong, tag, time } from "./dom.js";
import { runUrl } from "./router.js";

/** The end of a long id: ids begin with the time they were made, so those of one hour begin alike. */
export const shortCode = (id) => el("code", { title: id }, id.length > 20 ? `…${id.slice(-8)}` : id);

/** "TimeoutError: too slow", of whatever was recorded as an error. */
export function errorLine(error) {
	if (typeof error !== "object" || !error) return error ? String(error) : "";
	return [error.name, error.message].filter((part) => typeof part === "string" && part).join(": ");
}

/** How the parts of the server's line are shown: "waits for signal {b:signal}, until {at:until}". */
const PARTS = {
	b: strong, n: (value) => value, ago: (value) => time(value), at: (value) => time(value, "short"),
	for: (value) => time(value, "since"),
	ids: (list) => list.map((id, index) => [index > 0 && ", ", el("a", { href: runUrl(id) }, shortCode(id))]),
};

/** What to say of a run in one line: why it waits, or how it ended; null when it completed. */
export function outcome({ whyDetail, why, status, error, failureClass, cancelActor, cancelReason }) {
	if (whyDetail) {
		return whyDetail.line.split(/(\{\w+:\w+\})/).map((text) => {
			const [, kind, name] = /^\{(\w+):(\w+)\}$/.exec(text) ?? [];
			return kind ? PARTS[kind](whyDetail[name]) : text;
		});
	}
	if (status === "failed") {
		return [el("span.error-text", errorLine(error) || "failed"), failureClass && [" ", tag(failureClass)]];
	}
	if (status !== "cancelled") return why ?? null;
	return ["cancelled", cancelActor && ` by ${cancelActor}`, cancelReason && `: ${cancelReason}`];
}

export const shownStatus = (run) => (run.stalled ? "stalled" : run.status);

/** How long a run took, or takes so far, from its creation. */
export const runDuration = (run) => (run.completedAt ? duration(run.durationMs ?? 0)
	: run.status === "running" ? time(run.createdAt, "since") : dash());
