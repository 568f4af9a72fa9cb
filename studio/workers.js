// Workers: who asks for work, from which queues, what they hold, and when they were last heard.

import { get, poll } from "./api.js";
import { code, count, dash, el, empty, fill, grid, idText, link, muted, now, plural, setText, time } from "./dom.js";
import { runUrl } from "./router.js";

const QUIET_MS = 60_000;
const MOST_RUNS = 5; // that are named

export async function open({ main, signal }) {
	const tally = muted();
	const table = grid((worker) => worker.id ?? worker.queues.join(), [
		["Worker", (worker) => el("div.row", el(`span.mark.mark-${worker.quiet ? "reconnecting" : "live"}`, { title: worker.quiet ? "not heard of for a minute" : "there" }),
			worker.id ? idText(worker.id) : muted("a client without a name"))],
		["Queues", (worker) => el("div.row", (worker.queues ?? []).map((name) => el("span.tag", name)))],
		["Workflows", (worker) => worker.workflows?.join(", ") ?? muted("all")],
		["Runs", (worker) => el("div", worker.running === 0 && dash("none"), worker.runs.slice(0, MOST_RUNS).map((run) => el("div", link(runUrl(run.id), run.workflowName), muted(" heard ", time(run.heartbeatAt)))),
			worker.running > MOST_RUNS && `and ${count(worker.running - MOST_RUNS)} more`)],
		["Since", (worker) => time(worker.since)],
		["Last heard", (worker) => time(worker.heard)],
	], empty("No worker has asked for work", "A worker is your own process: ", code('tide.work(queues=["default"])'), ". Queued runs wait until one asks."));
	fill(main, el("header.spread", el("h1", "Workers"), tally), table.element);

	async function load() {
		const { workers } = await get("/workers");
		setText(tally, workers.length ? plural(workers.length, "worker") : "");
		table.set(workers.map((worker) => {
			const heard = worker.lastHeardAt ?? worker.lastAskedAt;
			return { ...worker, heard, quiet: now() - new Date(heard) > QUIET_MS };
		}));
	}
	await poll(load, 2500, signal);
}
