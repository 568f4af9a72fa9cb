// The page of a run: header with the verdict on a rerun, tabs, side panel. They draw from a LiveRun; what is open,
// selected and scrolled stays. And the page of two runs side by side.

import { breathe, canWrite, compareUrl, every, get, laterAgain, navigate, post, runsUrl, runUrl, setQuery, setTitle
	} from "./api.js";
import { actor, reviewForm } from "./approvals.js";
import { ask, between, button, card, code, compactCount, count, dash, duration, el, empty, errorText, facts, field, fill,
	grid, heading, icon, iconButton, idText, input, link, money, muted, once, plainTable, plural, row as inRow, select,
	setState, setText, show, skeleton, status, strong, time, toast } from "./dom.js";
import { LiveRun } from "./live.js";
import { bodyOf, diffTable, jsonInput, payload, readPayload } from "./payload.js";
import { attemptWords, errorLine, outcome, runDuration, runStatus, shownStatus } from "./runs.js";
import { attemptsTable, stepPanel, TABS } from "./tabs.js";
import { attemptsOf, makeWaterfall, Timeline } from "./waterfall.js";

export async function runPage({ main, parts: [id], query, signal }) {
	const run = new LiveRun(id, signal);
	await run.readSummary();
	const stepsRead = run.readSteps();
	const waterfall = makeWaterfall(run, open);
	const header = makeHeader(run, stepsRead, (step) => {
		tabs.open("timeline");
		waterfall.reveal(openStep(step.id));
	});
	const panel = makePanel(run, () => {
		waterfall.choose(null);
		setQuery({ step: null });
	});
	const tabs = makeTabs(run, panel, waterfall);
	fill(main, header.element, header.verdict, tabs.strip, el("div.split", tabs.content, panel.element));

	function open({ kind, key }) {
		if (kind === "run") panel.close();
		else if (kind === "child") navigate(runUrl(key));
		else if (kind === "gate") tabs.open("gates");
		else if (kind === "step") openStep(key);
	}

	function openStep(stepId) {
		const row = waterfall.choose(stepId);
		if (!row) return null;
		setQuery({ step: stepId });
		panel.open(row.name, stepPanel(run, row, () => waterfall.rowOf(stepId)));
		return row;
	}

	run.onChange = (events) => {
		header.draw();
		panel.update(events);
		tabs.update(events);
	};
	document.addEventListener("decided", () => {
		run.readSummarySoon();
		tabs.update([]);
	}, { signal });
	run.onChange(null);
	await Promise.all([stepsRead, run.readOthers()]);
	tabs.open(query.get("tab"));
	await breathe(30); // the browser lays it out: drawing the waterfall would do so in the same task
	waterfall.draw();
	openStep(query.get("step"));
	run.follow(header.mark);
	every(async () => run.isLive && waterfall.element.isConnected && waterfall.update(), 1000, signal);
	let turn = 0;
	every(async () => (run.isLive || ++turn % 5 === 0) && run.readAgain(), 3000, signal); // rarely once it has ended

	return {
		onQuery: (parameters) => tabs.open(parameters.get("tab")),
		escape: () => panel.close(),
	};
}

// --- the header, and below it the verdict on a rerun

function makeHeader(run, stepsRead, showStep) {
	const { id, light: { workflowName } } = run;
	const mark = el("span.mark", { role: "status" }, "loading");
	const [badge, why, about, actions] = [el("span"), el("p.why"), el("div"), el("div.row")];
	const verdict = el("section", { label: "Safe to rerun?", hidden: true });
	const element = el("header.stack",
		el("div.spread", el("h1", el("a", { href: runsUrl({ workflow: workflowName }) }, workflowName), badge), actions),
		el("div.spread", idText(id), mark), why, about);

	function draw() {
		const { light, cost } = run;
		const shown = shownStatus(light);
		setTitle(`${workflowName} ${shown}`);
		once(badge, shown, () => fill(badge, status(shown)));
		const step = (light.status === "failed" || light.whyDetail?.kind === "retry") && run.failedStep;
		once(why, [shown, light.whyDetail, light.error, light.cancelReason, step?.id], () => {
			const line = outcome(light);
			why.className = `why is-${shown}`;
			show(why, line);
			fill(why, el("span", line), step && button(`In step ${step.name}`, () => showStep(step), "quiet"));
		});
		once(about, [light, cost], () => fill(about, aboutRun(run)));
		const doubtful = /failed|cancelled|stalled/.test(shown) || light.whyDetail?.kind === "lease_expired";
		const wanted = canWrite() ? [run.isLive && "signal", !doubtful && "fork", run.isLive && "cancel"].filter(Boolean) : [];
		once(actions, wanted, () => fill(actions, wanted.map((name) => actionButton(name))));
		show(verdict, doubtful);
		once(verdict, doubtful && [shown, light.eventSeq], () => doubtful && drawVerdict().catch((error) => {
			verdict.source = null;
			laterAgain(error);
		}));
	}

	function actionButton(name, kind = "") {
		const [word, action, ownKind] = ACTIONS[name];
		return button(word, () => action(run), ownKind ?? kind);
	}

	async function drawVerdict() {
		const { safe, verdict: words, steps, blocking, actions: follow } = await get(`${run.url}/rerun`);
		await stepsRead;
		const shown = safe ? "completed" : "stalled";
		const buttons = follow.filter((name) => name in ACTIONS && name !== "cancel")
			.map((name, index) => actionButton(name, safe && index === 0 ? "primary" : ""));
		verdict.className = `card body verdict is-${shown}`;
		fill(verdict,
			el("div.spread", el("h2", icon(shown), el("span", words)), canWrite() && inRow(buttons)),
			canWrite() && steps.filter(({ name }) => blocking.includes(name)).map((step, index) =>
				el("details", { open: index === 0 },
					el("summary", "Decide ", strong(step.name)), errorText(errorLine(run.steps.get(step.id)?.error)),
					reviewForm(id, step))),
			steps.length > 0 && el("details", el("summary", "What a rerun would do, step by step"),
				plainTable(steps.map(({ name, plan, reason }) =>
					[name, el(`span.act.is-${plan}`, plan.replaceAll("_", " ")), muted(reason)]))));
	}

	return { element, mark, verdict, draw };
}

function aboutRun({ isLive, light, parent, cost: { own, subtree }, durationMs }) {
	const several = subtree?.runs > 1;
	const { costUsd, totalTokens, inputTokens, outputTokens } = several ? subtree : own;
	const budget = light.metadata?.budget ?? light.metadata?.budgetUsd;
	return facts({
		Duration: isLive ? time(light.createdAt, "since") : duration(durationMs ?? 0),
		Attempt: attemptWords(light),
		Queue: light.queue && link(runsUrl({ queue: light.queue }), light.queue),
		"Child of": parent && link(runUrl(parent.id), parent.name ?? parent.id),
		"Fork of": light.forkedFrom && link(compareUrl(light.forkedFrom, light.id), light.forkedFrom),
		Owner: light.leaseOwner && code(light.leaseOwner),
		"Lease ends": time(light.leaseExpiresAt),
		[several ? `Cost of ${plural(subtree.runs, "run")}` : "Cost"]: (costUsd > 0 || totalTokens > 0)
			&& el("span", { title: `${count(inputTokens)} in, ${count(outputTokens)} out; its own: ${money(own.costUsd)}` },
				money(costUsd), totalTokens > 0 && muted(` · ${compactCount(totalTokens)} tokens`)),
		Budget: typeof budget === "number" ? money(budget) : budget && JSON.stringify(budget),
		Created: time(light.createdAt, "short"),
		Ended: time(light.completedAt, "short"),
		Deadline: time(light.deadlineAt, isLive ? "ago" : "short"),
		"Dedupe key": light.dedupeKey && code(light.dedupeKey),
		Priority: light.priority || null,
	});
}

// --- actions: an event tells the page of what they did

const ACTIONS = { retry: ["Retry", retry], recover: ["Recover", recover], signal: ["Signal", sendSignal],
	fork: ["Fork", fork], cancel: ["Cancel", cancel, "danger"] };

async function retry({ url }) {
	const { safe, verdict } = await get(`${url}/rerun`);
	const sure = safe !== false || await ask("Retry all the same?", el("p", verdict), "Retry", "Do not");
	if (!sure) return;
	await post(`${url}/retry`);
	toast("It is put back.");
}

async function recover({ url }) {
	await post(`${url}/recover`);
	toast("Its recovery webhook is on the way.");
}

async function cancel({ url }) {
	const asked = await ask("Cancel this run?",
		[el("p", "It ends at once; its worker is told at its next write. Completed steps stay on record."),
			field("Reason", input("reason"))], "Cancel the run", "Keep it");
	if (asked) await post(`${url}/cancel`, bodyOf({ reason: asked.reason, actor: actor() || "studio" }));
}

async function sendSignal({ url, light }) {
	const asked = await ask("Send a signal", [
		field("Name", input("name", { required: true, value: light.whyDetail?.signal ?? "" })),
		field("Payload", jsonInput("payload"), "JSON; empty is null")], "Send");
	if (!asked) return;
	await post(`${url}/signals`, bodyOf({ name: asked.name }, { payload: asked.payload }));
	toast("The signal is sent.");
}

/** From which step, and with what input? What is reused is shown. */
async function fork(run) {
	const steps = [...run.steps.values()].sort((one, other) => one.position - other.position);
	const given = run.light.inputBytes > 0 ? await readPayload(run.id, "input") : "{}";
	const preview = el("div", { role: "status" });
	const note = muted("The input is another one: reused steps keep what they returned for the old one.");
	const from = select("Run again from", [...steps.map(({ name }) => [name, name]),
		["", "the end: reuse all completed steps"]], draw, { name: "fromStep" });
	from.value = (steps.find(({ status: is }) => is !== "completed") ?? steps.at(-1))?.name ?? "";
	const names = (await get("/queues")).queues.map(({ name }) => [name, name]);
	const queue = select("Queue", [["", "that of this run"], ...names], null, { name: "queue" });
	const payload = jsonInput("input", { value: given });
	payload.addEventListener("input", draw);
	function draw() {
		const cut = steps.findIndex(({ name }) => name === from.value);
		const [kept, again] = [true, false].map((wanted) => steps.filter(({ status: is }, index) =>
			(is === "completed" && (cut < 0 || index < cut)) === wanted));
		fill(preview, [["Reused", kept], ["Runs again", again]].map(([word, some]) =>
			el("p.clip", strong(`${word}: ${plural(some.length, "step")} `), muted(some.map(({ name }) => name).join(", ")))));
		show(note, kept.length > 0 && payload.value !== given);
	}
	draw();
	const values = await ask("Fork this run", [
		el("p", "A new run of the same workflow. It begins with copies of the checkpoints before the step that you choose."),
		field("Run again from", from), preview, field("Queue", queue), field("Input", payload), note,
	], "Fork");
	if (!values) return;
	const { fromStep, queue: chosen, input: typed } = values;
	const body = bodyOf({ fromStep, queue: chosen }, { input: typed === given ? null : typed });
	navigate(compareUrl(run.id, (await post(`${run.url}/fork`, body)).run.id));
}

// --- the tabs

function makeTabs(run, panel, waterfall) {
	const opened = new Map([["timeline", waterfall]]);
	let chosen = null;
	const content = el("div.stack", { role: "tabpanel", tabindex: "-1" });
	const strip = el("nav.tabs", { role: "tablist", label: "What is known of this run", onkeydown({ key, target }) {
		if (key === "ArrowRight") target.nextSibling?.focus();
		if (key === "ArrowLeft") target.previousSibling?.focus();
	} }, ["timeline", ...Object.keys(TABS)].map((name) =>
		el("a", { role: "tab", id: `tab-${name}`, href: runUrl(run.id, { tab: name }), onclick(event) {
			event.preventDefault();
			open(name);
		} }, name[0].toUpperCase() + name.slice(1), el("span"))));

	function drawStrip() {
		const { counts, state } = run;
		const numbers = { ...counts, timeline: counts.steps, state: state?.version, webhooks: counts.deliveries };
		for (const anchor of strip.children) {
			const name = anchor.id.slice(4);
			setState(anchor, "selected", name === chosen);
			anchor.tabIndex = name === chosen ? 0 : -1;
			setText(anchor.lastChild, numbers[name] ? compactCount(numbers[name]) : "");
		}
	}

	function open(name) {
		if (!TABS[name]) name = "timeline";
		if (name === chosen) return;
		chosen = name;
		setQuery({ tab: name === "timeline" ? null : name });
		if (opened.has(name)) opened.get(name).update([]);
		else opened.set(name, TABS[name](run, panel));
		fill(content, opened.get(name).element);
		content.setAttribute("aria-labelledby", `tab-${name}`);
		panel.close();
		drawStrip();
		document.getElementById(`tab-${name}`).scrollIntoView({ block: "nearest", inline: "nearest" });
	}

	return { strip, content, open, update(events) {
		drawStrip();
		opened.get(chosen)?.update(events);
	} };
}

// --- the side panel: what was opened, else the run's own payloads

function makePanel(run, onClose) {
	const element = el("aside.card.side", { label: "Details" });
	const attempts = el("div");
	const isOpen = () => element.classList.contains("opened");
	let content = null;

	/** `body` may have an update(events). */
	function open(title, body) {
		content = body;
		fill(element, el("header", el("h2", { title }, title), iconButton("close", "Close details", close)),
			el("div.body.stack", body));
		element.classList.add("opened");
		element.scrollTop = 0;
	}

	/** Resolves to whether it was open. */
	function close() {
		if (!isOpen()) return false;
		element.classList.remove("opened");
		content = element.source = null;
		onClose();
		drawRun();
		return true;
	}

	function drawRun() {
		const { light, id } = run;
		const failed = light.status === "failed";
		const error = [failed ? "Error" : "Error of an earlier attempt", "error"];
		const kinds = [failed && error, ["Result", "result"], ["Input", "input"],
			light.metadataBytes > 2 && ["Metadata", "metadata"], !failed && error]
			.filter((kind) => kind && light[`${kind[1]}Bytes`] > 0);
		once(element, kinds.map(([, of]) => [of, light[`${of}Bytes`]]), () => fill(element, el("header", el("h2", "The run")),
			el("div.body.stack", attempts, kinds.map(([word, of]) => payload(word, id, of, null, of === "error")),
				kinds.length === 0 && muted("It has no input and no result yet."))));
		const itself = new Timeline(run, []).run;
		show(attempts, attemptsOf(itself).length > 1);
		once(attempts, attemptsOf(itself), () => fill(attempts, attemptsTable(itself)));
	}

	return { element, open, close, update: (events) => (isOpen() ? events && content.update?.(events) : drawRun()) };
}

// --- two runs side by side: which of their steps differ, as after a fork

const LONGEST = 65_536; // bytes of an output that is compared by itself
const MOST = 200; // outputs that are

export async function comparePage({ main, query, signal }) {
	const runs = ["a", "b"].map((name) => new LiveRun(query.get(name), signal));
	const heads = runs.map(() => el("div", skeleton(2)));
	const outputs = new Map(); // step name -> how the outputs compare, once they were read
	const tally = el("p.muted.clip", { role: "status" });
	const details = el("div");
	const cell = (step) => (step ? inRow(status(step.status), step.copied ? muted("reused")
		: step.completedAt && step.startedAt && muted(between(step.startedAt, step.completedAt))) : dash());
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
