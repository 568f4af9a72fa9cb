// Workers: who asks for work, from which queues, what they hold, and when they were last heard.

import { get, poll } from "./api.js";
import { el, empty, fill, grid, idText, now, plural, setText, skeleton, time } from "./dom.js";
import { runUrl } from "./router.js";

const QUIET_MS = 60_000;

export async function open({ main, signal }) {
	const tally = el("span.muted");
	const box = el("div", skeleton());
	const table = grid((worker) => worker.id ?? worker.queues.join(), [
		["Worker", (worker) => el("div.row", el(`span.mark.mark-${worker.quiet ? "reconnecting" : "live"}`, { title: worker.quiet ? "not heard of for a minute" : "there" }),
			worker.id ? idText(worker.id) : el("span.muted", "a client without a name"))],
		["Queues", (worker) => el("div.row", worker.queues.map((name) => el("span.tag", name)))],
		["Workflows", (worker) => worker.workflows?.join(", ") ?? el("span.muted", "all")],
		["Runs", (worker) => (worker.running === 0 ? el("span.none", "none") : el("details", el("summary", plural(worker.running, "run")),
			worker.runs.map((run) => el("div.row", el("a.link", { href: runUrl(run.id) }, run.workflowName), "for ", time(run.since, "since"))),
			worker.running > worker.runs.length && `and ${worker.running - worker.runs.length} more`))],
		["Since", (worker) => time(worker.since)],
		["Last heard", (worker) => time(worker.heard)],
	]);
	fill(main, el("header.spread", el("h1", "Workers"), tally), box);

	async function load() {
		const { workers } = await get("/workers");
		setText(tally, workers.length ? plural(workers.length, "worker") : "");
		if (workers.length === 0) return fill(box, empty("No worker has asked for work", "A worker is your own process: ", el("code", 'tide.work(queues=["default"])'), ". Queued runs wait until one asks."));
		if (table.element.parentNode !== box) fill(box, table.element);
		table.set(workers.map((worker) => {
			const heard = worker.lastHeardAt ?? worker.lastAskedAt;
			return { ...worker, heard, quiet: now() - new Date(heard) > QUIET_MS };
		}));
	}
	await load();
	poll(load, 2500, signal);
}
