// Fork a run from a step, with a preview of what is reused; and two runs side by side.

import { every, follow, get, laterAgain, path, post, runUrl } from "./api.js";
import { ask, between, button, card, dash, debounce, el, empty, facts, field, fill, grid, heading, idText, money, muted,
	plural, row, select, setText, show, skeleton, status, strong, time } from "./dom.js";
import { bodyOf, diffTable, jsonInput, readPayload } from "./payload.js";
import { outcome, runDuration, runStatus } from "./runs.js";

/** Ask from where to fork, and with what input. Resolves to the new run, or null. */
export async function askFork(run) {
	const steps = [...run.steps.values()].sort((one, other) => one.position - other.position);
	const given = run.light.inputBytes > 0 ? await readPayload(run.id, "input") : "{}";
	const preview = el("div", { role: "status" });
	const note = muted("The input is another one: reused steps keep what they returned for the old one.");
	const from = select("Run again from", [...steps.map(({ name }) => [name, name]),
		["", "the end: reuse all completed steps"]], draw, { name: "fromStep" });
	from.value = (steps.find(({ status: is }) => is !== "completed") ?? steps.at(-1))?.name ?? "";
	const { queues } = await get("/queues");
	const own = run.light.queue ?? "";
	const others = queues.map(({ name }) => [name, name]).filter(([name]) => name !== own);
	const queue = select("Queue", [[own, own || "none"], ...others], null, { name: "queue" });
	const payload = jsonInput("input", { value: given });
	payload.addEventListener("input", draw);
	function draw() {
		const cut = from.value ? steps.findIndex(({ name }) => name === from.value) : steps.length;
		const kept = steps.filter((step, index) => index < cut && step.status === "completed");
		const again = steps.filter((step) => !kept.includes(step));
		fill(preview, [["Reused", kept], ["Runs again", again]].map(([word, some]) =>
			el("p.clip", strong(`${word}: ${plural(some.length, "step")} `), muted(some.map(({ name }) => name).join(", ")))));
		show(note, kept.length > 0 && payload.value !== given);
	}
	draw();
	const values = await ask("Fork this run", [
		el("p", "A new run of the same workflow. It begins with copies of the checkpoints before the step that you choose."),
		field("Run again from", from), preview, field("Queue", queue), field("Input", payload), note,
	], "Fork");
	if (!values) return null;
	const { fromStep, queue: chosen, input } = values;
	const body = bodyOf({ fromStep, queue: chosen }, { input: input === given ? null : input });
	return (await post(`${run.url}/fork`, body)).run;
}

const LONGEST = 65_536; // bytes of an output that is compared by itself
const MOST = 200; // outputs that are

export async function comparePage({ main, query, signal }) {
	const sides = ["a", "b"].map((name) => ({ id: query.get(name), steps: new Map(), head: el("div", skeleton(2)) }));
	const [first, second] = sides;
	const outputs = new Map(); // step name -> how the outputs compare, once they were read
	const tally = el("p.muted.clip", { role: "status" });
	const details = el("div");
	const cell = (step) => (step ? row(status(step.status), muted(step.copied ? "reused"
		: step.completedAt && step.startedAt && between(step.startedAt, step.completedAt))) : dash());
	const table = grid("name", [
		["Step", "name"], ["First", ({ pair }) => cell(pair[0])], ["Second", ({ pair }) => cell(pair[1])],
		["Output", ({ name, word }) => (word === "differs"
			? button("differs: show", () => showDifference(name), "quiet") : muted(word))],
	], empty("No steps"));
	fill(main, heading("Side by side"), el("div.sides", first.head, second.head), tally, table, details);

	async function readSide(side, index) {
		const [{ run, cost }, { steps }] = await Promise.all([
			get(path`/runs/${side.id}/summary`), get(path`/runs/${side.id}/steps`, { limit: 1000 })]);
		side.run = run;
		side.steps = new Map(steps.map((step) =>
			[step.name, { ...step, copied: step.copied || step.completedAt < run.createdAt }]));
		const title = el("a", { href: runUrl(run.id) }, index === 0 ? "First: " : "Second: ", run.workflowName);
		fill(side.head, card(title, runStatus(run), idText(run.id), facts({ Duration: runDuration(run),
			Cost: money(cost.own.costUsd), Created: time(run.createdAt) }), muted(outcome(run))));
	}

	async function load() {
		await Promise.all(sides.map(readSide));
		draw();
		for (const { name, pair } of rows().filter(({ word }) => word === "reading").slice(0, MOST)) {
			const size = pair[0].outputBytes;
			const same = async () => new Set(await readOutputs(name)).size === 1;
			outputs.set(name, size > LONGEST ? "long" : size === 0 || await same() ? "same" : "differs");
		}
		draw();
	}

	const readOutputs = (name) =>
		Promise.all(sides.map((side) => readPayload(side.id, "step.output", side.steps.get(name).id)));

	const rows = () => [...new Set(sides.flatMap((side) => [...side.steps.keys()]))].map((name) => {
		const pair = sides.map((side) => side.steps.get(name));
		return { name, pair, word: wordOf(name, ...pair) };
	});

	function wordOf(name, one, other) {
		if (!one || !other) return "only in one";
		if (one.copied || other.copied) return "reused";
		if (one.status !== "completed" || other.status !== "completed") return "open";
		return one.outputBytes === other.outputBytes ? outputs.get(name) ?? "reading" : "differs";
	}

	function draw() {
		const list = rows();
		const differing = list.filter(({ word }) => word === "differs" || word === "only in one").map(({ name }) => name);
		const all = plural(list.length, "step");
		table.set(list);
		setText(tally, differing.length ? `${differing.length} of ${all} differ: ${differing.join(", ")}`
			: `No difference found in ${all}.`);
	}

	async function showDifference(name) {
		fill(details, card(`Output of ${name}`, null, diffTable(...await readOutputs(name))));
		details.scrollIntoView({ block: "nearest" });
	}

	await load();
	const again = debounce(() => load().catch(laterAgain), 300);
	follow(second.id, second.run.eventSeq, again, () => {}, signal); // one stream a tab: the second is the one under way
	every(async () => sides.every((side) => side.run.completedAt) || again(), 3000, signal);
}
