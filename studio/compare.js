// Fork a run from a step, with a preview of what is reused; and two runs side by side.

import { every, follow, get, laterAgain, path, post } from "./api.js";
import { bodyOf, jsonInput } from "./decide.js";
import { ask, button, card, dash, debounce, duration, el, empty, facts, field, fill, grid, idText, money, muted, plural, setText, skeleton, status, time } from "./dom.js";
import { diffTable, readPayload } from "./payload.js";
import { runUrl } from "./router.js";
import { outcome, runDuration, shownStatus } from "./why.js";

const LONGEST = 65_536; // bytes of an output that is compared by itself

/** Ask from where to fork, and with what input. Resolves to the new run, or null. */
export async function askFork({ run }, steps, inputText) {
	steps.sort((a, b) => a.position - b.position);
	const preview = el("dl.facts", { role: "status" });
	const note = el("p.muted", "The input is another one: reused steps keep what they returned for the old one.");
	const from = el("select", { name: "fromStep", onchange: draw }, steps.map(({ name }) => el("option", { value: name }, name)), el("option", { value: "" }, "the end: reuse all completed steps"));
	from.value = (steps.find((step) => step.status !== "completed") ?? steps.at(-1))?.name ?? "";
	const input = jsonInput("input", { value: inputText });
	input.addEventListener("input", draw);
	function draw() {
		const cut = from.value ? steps.findIndex((step) => step.name === from.value) : steps.length;
		const kept = steps.filter((step, index) => index < cut && step.status === "completed");
		const again = steps.filter((step) => !kept.includes(step));
		const list = (word, some) => el("div", el("dt", `${word}: ${plural(some.length, "step")}`), el("dd", some.slice(0, 12).map(({ name }) => name).join(", ") + (some.length > 12 ? ` and ${some.length - 12} more` : "")));
		fill(preview, list("Reused", kept), list("Runs again", again));
		note.hidden = kept.length === 0 || input.value === inputText;
	}
	draw();
	const values = await ask("Fork this run", [el("p", "A new run of the same workflow. It begins with copies of the checkpoints before the step that you choose."), field("Run again from", from), preview,
		field("Input", input), note, run.queue && field("Queue", el("input", { name: "queue", value: run.queue }))], "Fork");
	if (!values) return null;
	const { fromStep, queue } = values;
	return (await post(path`/runs/${run.id}/fork`, bodyOf({ fromStep, queue: queue === run.queue ? null : queue }, values.input === inputText ? {} : { input: values.input }))).run;
}

export async function open({ main, query, signal }) {
	const sides = ["a", "b"].map((name) => ({ id: query.get(name), steps: new Map(), head: el("div", skeleton(2)) }));
	const [first, second] = sides;
	const same = new Map(); // step name -> whether both outputs are the same, once they were read
	const tally = el("p.muted", { role: "status" });
	const details = el("div");
	const cell = (side) => ({ [side]: step }) => (step ? el("span.row", status(step.status), muted(step.copied ? "reused" : step.completedAt && step.startedAt && duration(new Date(step.completedAt) - new Date(step.startedAt)))) : dash());
	const table = grid(({ name }) => name, [["Step", ({ name }) => name], ["First", cell("a")], ["Second", cell("b")],
		["Output", ({ name, word }) => (word === "differs" ? button("differs: show", () => showDifference(name), "quiet") : muted(word))]], empty("No steps"));
	fill(main, el("h1", "Side by side"), el("div.sides", first.head, second.head), tally, table.element, details);

	async function load() {
		await Promise.all(sides.map(async (side, index) => {
			const [summary, { steps }] = await Promise.all([get(path`/runs/${side.id}/summary`), get(path`/runs/${side.id}/steps`, { limit: 1000 })]);
			const { run, cost } = summary;
			side.run = run;
			side.steps = new Map(steps.map((step) => [step.name, { ...step, copied: step.copied || step.completedAt < run.createdAt }]));
			fill(side.head, card(el("a", { href: runUrl(run.id) }, index === 0 ? "First: " : "Second: ", run.workflowName), status(shownStatus(run)), idText(run.id),
				facts([["Duration", runDuration(run)], ["Cost", money(cost.own.costUsd)], ["Created", time(run.createdAt)]]), el("p.muted", outcome(run))));
		}));
		draw();
		for (const { name, a } of rows().filter(({ word }) => word === "reading").slice(0, 200)) {
			same.set(name, a.outputBytes > LONGEST ? "long" : !a.outputBytes || (await outputOf(first, name)) === (await outputOf(second, name)) ? "same" : "differs");
		}
		draw();
	}

	const outputOf = (side, name) => readPayload(side.id, "step.output", side.steps.get(name).id);
	const rows = () => [...new Set([...first.steps.keys(), ...second.steps.keys()])].map((name) => {
		const [a, b] = sides.map((side) => side.steps.get(name));
		return { name, a, b, word: wordOf(name, a, b) };
	});

	function wordOf(name, a, b) {
		if (!a || !b) return "only in one";
		if (a.copied || b.copied) return "reused";
		if (a.status !== "completed" || b.status !== "completed") return "open";
		return a.outputBytes === b.outputBytes ? same.get(name) ?? "reading" : "differs";
	}

	function draw() {
		const list = rows();
		const differing = list.filter(({ word }) => word === "differs" || word === "only in one").map(({ name }) => name);
		table.set(list);
		setText(tally, differing.length ? `${differing.length} of ${plural(list.length, "step")} differ: ${differing.slice(0, 8).join(", ")}` : `No difference found in ${plural(list.length, "step")}.`);
	}

	async function showDifference(name) {
		fill(details, card(`Output of ${name}`, null, diffTable(await outputOf(first, name), await outputOf(second, name))));
		details.scrollIntoView({ block: "nearest" });
	}

	await load();
	const again = debounce(() => load().catch(laterAgain), 300);
	follow(second.id, second.run.eventSeq, again, () => {}, signal); // one stream a tab: the second is the one under way
	every(async () => sides.every((side) => side.run.completedAt) || again(), 3000, signal);
}
