// Two runs side by side: which of their steps differ, as after a fork.

import { every, runUrl } from "./api.js";
import { between, button, card, dash, el, empty, facts, fill, grid, heading, idText, money, muted, plural, row, setText,
	skeleton, status, time } from "./dom.js";
import { LiveRun } from "./live.js";
import { diffTable, readPayload } from "./payload.js";
import { outcome, runDuration, runStatus } from "./runs.js";

const LONGEST = 65_536; // bytes of an output that is compared by itself
const MOST = 200; // outputs that are

export async function comparePage({ main, query, signal }) {
	const runs = ["a", "b"].map((name) => new LiveRun(query.get(name), signal));
	const heads = runs.map(() => el("div", skeleton(2)));
	const outputs = new Map(); // step name -> how the outputs compare, once they were read
	const tally = el("p.muted.clip", { role: "status" });
	const details = el("div");
	const cell = (step) => (step ? row(status(step.status), muted(step.copied ? "reused"
		: step.completedAt && step.startedAt && between(step.startedAt, step.completedAt))) : dash());
	const table = grid("name", [
		["Step", "name"], ["First", ({ pair }) => cell(pair[0])], ["Second", ({ pair }) => cell(pair[1])],
		["Output", ({ name, word, pair }) => (word === "differs"
			? button("differs: show", () => showDifference(name, pair), "quiet") : muted(word))],
	], empty("No steps"));
	fill(main, heading("Side by side"), el("div.sides", heads), tally, table, details);

	async function load() {
		await Promise.all(runs.map((run) => run.readAll()));
		runs.forEach(({ light, cost }, index) => fill(heads[index], card(
			el("a", { href: runUrl(light.id) }, index === 0 ? "First: " : "Second: ", light.workflowName), runStatus(light),
			idText(light.id), facts({ Duration: runDuration(light), Cost: money(cost.own.costUsd),
				Created: time(light.createdAt) }), muted(outcome(light)))));
		for (const { name, pair } of draw().filter(({ word }) => word === "reading").slice(0, MOST)) {
			const size = pair[0].outputBytes;
			const same = async () => new Set(await readOutputs(pair)).size === 1;
			outputs.set(name, size > LONGEST ? "long" : size === 0 || await same() ? "same" : "differs");
		}
		draw();
	}

	const readOutputs = (pair) =>
		Promise.all(pair.map(({ id }, index) => readPayload(runs[index].id, "step.output", id)));

	function wordOf(name, one, other) {
		if (!one || !other) return "only in one";
		if (one.copied || other.copied) return "reused";
		if (one.status !== "completed" || other.status !== "completed") return "open";
		return one.outputBytes === other.outputBytes ? outputs.get(name) ?? "reading" : "differs";
	}

	function draw() {
		const steps = runs.map((run) => new Map([...run.steps.values()].map((step) => [step.name, step])));
		const list = [...new Set(steps.flatMap((some) => [...some.keys()]))].map((name) => {
			const pair = steps.map((some) => some.get(name));
			return { name, pair, word: wordOf(name, ...pair) };
		});
		const differing = list.filter(({ word }) => word === "differs" || word === "only in one").map(({ name }) => name);
		const all = plural(list.length, "step");
		table.set(list);
		setText(tally, differing.length ? `${differing.length} of ${all} differ: ${differing.join(", ")}`
			: `No difference found in ${all}.`);
		return list;
	}

	async function showDifference(name, pair) {
		fill(details, card(`Output of ${name}`, null, diffTable(...await readOutputs(pair))));
		details.scrollIntoView({ block: "nearest" });
	}

	await load();
	every(async () => runs.some((run) => run.isLive) && load(), 1500, signal);
}
