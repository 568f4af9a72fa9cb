// Workers: who asks for work, from which queues, what they hold, and when they were last heard.

import { get, poll } from "./api.js";
import { code, count, dash, el, empty, fill, grid, heading, idText, link, muted, now, plural, setText, tag, time }
	from "./dom.js";
import { runUrl } from "./router.js";

const QUIET_MS = 60_000;
const MOST_RUNS = 5; // that are named

export async function open({ main, signal }) {
	const tally = muted();
	const table = grid((worker) => worker.id ?? worker.queues.join(), [
		["Worker", ({ id, quiet }) => el("div.row",
			el(`span.mark.mark-${quiet ? "reconnecting" : "live"}`, { title: quiet ? "not heard of for a minute" : "there" }),
			id ? idText(id) : muted("a client without a name"))],
		["Queues", ({ queues }) => el("div.row", (queues ?? []).map(tag))],
		["Workflows", ({ workflows }) => workflows?.join(", ") ?? muted("all")],
		["Runs", ({ running, runs }) => el("div", running === 0 && dash("none"),
			runs.slice(0, MOST_RUNS).map((run) =>
				el("div", link(runUrl(run.id), run.workflowName), muted(" heard ", time(run.heartbeatAt)))),
			running > MOST_RUNS && `and ${count(running - MOST_RUNS)} more`)],
		["Since", ({ since }) => time(since)],
		["Last heard", ({ heard }) => time(heard)],
	], empty("No worker has asked for work", "A worker is your own process: ", code('tide.work(queues=["default"])'),
		". Queued runs wait until one asks."));
	fill(main, heading("Workers", tally), table.element);

	await poll(async () => {
		const { workers } = await get("/workers");
		setText(tally, workers.length ? plural(workers.length, "worker") : "");
		table.set(workers.map((worker) => {
			const heard = worker.lastHeardAt ?? worker.lastAskedAt;
			return { ...worker, heard, quiet: now() - new Date(heard) > QUIET_MS };
		}));
	}, 2500, signal);
}
