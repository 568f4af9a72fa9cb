// A run: what it is, why it waits, whether a rerun is safe, and what happened, live.
//
// The page reads a summary and the steps once, follows the run's event stream by seq, and applies each event to the
// timeline. Rows are read again only for what an event does not carry. What is open, selected and scrolled stays.

import { canWrite, compareUrl, every, follow, get, laterAgain, navigate, path, post, runsUrl, runUrl, session, setQuery,
	setTitle } from "./api.js";
import { actor, reviewForm } from "./approvals.js";
import { askFork } from "./compare.js";
import { ask, attempt, button, code, compactCount, count, debounce, duration, el, facts, field, fill, icon, iconButton,
	idText, input, link, money, muted, plainTable, plural, row as inRow, setMark, setState, setText, show, status, strong,
	time, toast } from "./dom.js";
import { bodyOf, jsonInput, payload, readPayload } from "./payload.js";
import { errorLine, isCut, outcome, shownStatus } from "./runs.js";
import { stepPanel, TABS } from "./tabs.js";
import { makeWaterfall, once, Timeline } from "./waterfall.js";

const MOST_EVENTS = 20_000; // of a longer run, the last so many are read at once

export async function runPage({ main, parts: [id], query, signal }) {
	let summary = await get(path`/runs/${id}/summary`);
	let panelOf = null; // the key of what the side panel shows, if that is not the run itself
	let tab = null;
	let lastPosition = 0;
	let inVerdict = []; // actions that stand beside the verdict
	const timeline = new Timeline(session.leaseMs, id);
	/** What the tabs share. */
	const model = { id, signal, timeline, events: [], steps: new Map(), listeners: new Set(), keepStep, openPanel,
		readSummary, get summary() { return summary; } };
	const isLive = () => !summary.run.completedAt;

	const mark = el("span.mark", { role: "status" }, "loading");
	const badge = el("span");
	const why = el("p.why");
	const about = el("div");
	const verdict = el("section", { "aria-label": "Safe to rerun?", hidden: true });
	const actions = el("div.row");
	const tabs = el("nav.tabs", { role: "tablist", "aria-label": "What is known of this run" });
	const panel = el("aside.card.side", { "aria-label": "Details" });
	const content = el("div.stack", { role: "tabpanel", tabindex: "-1" });
	const { workflowName } = summary.run;
	const title = el("a", { href: runsUrl({ workflow: workflowName }) }, workflowName);
	fill(main,
		el("header.stack", el("div.spread", el("h1", title, badge), actions), el("div.spread", idText(id), mark), why, about),
		verdict, tabs, el("div.split", content, panel));

	// --- header: each part is built again only when it says something else; times keep themselves up to date

	function showHeader() {
		const { run, cost } = summary;
		const shown = shownStatus(run);
		timeline.setRun(run);
		setTitle(`${workflowName} ${shown}`);
		once(badge, shown, () => {
			fill(badge, status(shown));
			readVerdict();
		});
		once(why, [shown, run.whyDetail, run.error, run.cancelReason], () => {
			const line = outcome(run);
			why.className = `why is-${shown}`;
			show(why, line);
			fill(why, el("span", line), run.status === "failed" && isCut(run.error)
				&& button("Show all of it", showError, "quiet"));
		});
		once(about, [run, cost], () => fill(about, facts(aboutRun(summary, isLive()))));
		showActions();
		showTabs();
		if (!panelOf) showRunPanel();
	}

	const showError = async () =>
		fill(why, el("span.error-text", errorLine(JSON.parse(await readPayload(id, "error")))));

	const ACTIONS = { retry: ["Retry", retry], recover: ["Recover", recover], signal: ["Signal", signalRun],
		fork: ["Fork", forkRun], cancel: ["Cancel", cancel, "danger"] };
	const actionButton = (name, kind) => button(ACTIONS[name][0], async () => {
		await attempt(ACTIONS[name][1]);
		readSummary().catch(laterAgain);
	}, ACTIONS[name][2] ?? kind);

	function showActions() {
		if (!canWrite()) return;
		const { status: is, stalled, hasRecoveryWebhook } = summary.run;
		const ended = is === "failed" || is === "cancelled";
		const wanted = [ended && "retry", (ended || stalled) && hasRecoveryWebhook && "recover", isLive() && "signal", "fork",
			isLive() && "cancel"].filter((name) => name && !inVerdict.includes(name));
		once(actions, wanted, () => fill(actions, wanted.map((name) => actionButton(name))));
	}

	async function readVerdict() {
		const wanted = /failed|cancelled|stalled/.test(shownStatus(summary.run))
			|| summary.run.whyDetail?.kind === "lease_expired";
		const plan = wanted ? await get(path`/runs/${id}/rerun`).catch(laterAgain) : null;
		const shown = plan && plan.safe !== null;
		inVerdict = shown ? plan.actions.filter((name) => ["retry", "recover", "fork"].includes(name)) : [];
		show(verdict, shown);
		showActions();
		if (!shown) return;
		const blocking = canWrite() ? plan.steps.filter((step) => step.plan === "stops_for_review") : [];
		const buttons = inVerdict.map((name, index) => actionButton(name, index === 0 && plan.safe ? "primary" : ""));
		const decided = () => {
			readVerdict();
			readSummary();
		};
		const shownAs = plan.safe ? "completed" : "stalled";
		verdict.className = `card body verdict is-${shownAs}`;
		fill(verdict,
			el("div.spread", el("h2", icon(shownAs), el("span", plan.verdict)),
				canWrite() && inRow(buttons)),
			blocking.map((step) => el("details", { open: blocking.length === 1 },
				el("summary", "Decide ", strong(step.name)), reviewForm(id, step, decided))),
			plan.steps.length > 0 && el("details", el("summary", "What a rerun would do, step by step"),
				plainTable(plan.steps.map(({ name, plan: kind, reason }) =>
					[name, el(`span.act.is-${kind}`, kind.replaceAll("_", " ")), muted(reason)]))));
	}

	// --- actions

	async function retry() {
		const plan = await get(path`/runs/${id}/rerun`);
		const sure = plan.safe !== false || await ask("Retry all the same?", el("p", plan.verdict), "Retry",
			{ kind: "danger", otherwise: "Do not" });
		if (!sure) return;
		await post(path`/runs/${id}/retry`);
		toast("It is put back.");
	}

	async function recover() {
		await post(path`/runs/${id}/recover`);
		toast("Its recovery webhook is on the way.");
	}

	async function cancel() {
		const asked = await ask("Cancel this run?",
			[el("p", "It ends at once; its worker is told at its next write. Completed steps stay on record."),
				field("Reason", input("reason"))], "Cancel the run", { kind: "danger", otherwise: "Keep it" });
		if (asked) await post(path`/runs/${id}/cancel`, bodyOf({ reason: asked.reason, actor: actor() || "studio" }));
	}

	async function signalRun() {
		const asked = await ask("Send a signal", [
			field("Name", input("name", { required: true, value: summary.run.whyDetail?.signal ?? "" })),
			field("Payload", jsonInput("payload"), "JSON; empty is null")], "Send");
		if (!asked) return;
		await post(path`/runs/${id}/signals`, bodyOf({ name: asked.name }, { payload: asked.payload }));
		toast("The signal is sent.");
	}

	async function forkRun() {
		const given = summary.run.inputBytes > 0 ? await readPayload(id, "input") : "{}";
		const fork = await askFork(summary, [...model.steps.values()], given);
		if (fork) navigate(compareUrl(id, fork.id));
	}

	// --- the side panel: one step, event or delivery, else the run's own payloads

	function openPanel(heading, nodes, key) {
		panelOf = key;
		fill(panel, el("header", el("h2", { title: heading }, heading), iconButton("close", "Close details", closePanel)),
			el("div.body.stack", nodes));
		panel.classList.add("opened");
		panel.scrollTop = 0;
	}

	function closePanel() {
		panelOf = panel.source = null;
		panel.classList.remove("opened");
		waterfall.choose(null);
		setQuery({ step: null });
		showRunPanel();
	}

	function showRunPanel() {
		const { run } = summary;
		const failed = run.status === "failed";
		const error = [failed ? "Error" : "Error of an earlier attempt", "error"];
		const kinds = [failed && error, ["Result", "result"], ["Input", "input"],
			run.metadataBytes > 2 && ["Metadata", "metadata"], !failed && error]
			.filter((kind) => kind && run[`${kind[1]}Bytes`] > 0);
		once(panel, kinds.map(([, of]) => [of, run[`${of}Bytes`]]), () => fill(panel, el("header", el("h2", "The run")),
			el("div.body.stack", kinds.map(([word, of]) => payload(word, id, of)),
				kinds.length === 0 && muted("It has no input and no result yet."))));
	}

	function select(row) {
		if (row.kind === "run") return closePanel();
		if (row.kind === "child") return navigate(runUrl(row.key));
		if (row.kind === "gate") return showTab("gates");
		if (row.kind !== "step") return;
		waterfall.choose(row.key);
		setQuery({ step: row.key });
		openPanel(row.name, stepPanel(model, row), row.key);
	}

	// --- tabs

	const waterfall = makeWaterfall(timeline, { signal, onSelect: select, async onOpen(childId) {
		const [child, { steps }] = await Promise.all([
			get(path`/runs/${childId}/summary`), get(path`/runs/${childId}/steps`, { limit: 500 })]);
		const own = new Timeline(session.leaseMs, childId);
		own.setRun(child.run);
		steps.forEach((step) => own.setStep(step));
		return own;
	} });
	const opened = new Map([["timeline", { element: waterfall.element, update: waterfall.schedule }]]);

	function makeTab(name) {
		return el("a", { role: "tab", id: `tab-${name}`, href: runUrl(id, { tab: name }), onclick(event) {
			event.preventDefault();
			showTab(name);
		} }, name[0].toUpperCase() + name.slice(1), el("span"));
	}

	function showTabs() {
		const { counts, state } = summary;
		const numbers = { ...counts, timeline: counts.steps, state: state?.version, webhooks: counts.deliveries };
		for (const anchor of tabs.children) {
			const name = anchor.id.slice(4);
			setState(anchor, "selected", name === tab);
			anchor.tabIndex = name === tab ? 0 : -1;
			setText(anchor.lastChild, numbers[name] ? compactCount(numbers[name]) : "");
		}
	}

	function showTab(name) {
		if (!(name in TABS)) name = "timeline";
		if (name === tab) return;
		tab = name;
		setQuery({ tab: name === "timeline" ? null : name });
		if (!opened.has(name)) opened.set(name, TABS[name](model));
		fill(content, opened.get(name).element);
		content.setAttribute("aria-labelledby", `tab-${name}`);
		if (panelOf) closePanel();
		showTabs();
		document.getElementById(`tab-${name}`).scrollIntoView({ block: "nearest", inline: "nearest" });
		opened.get(name).update([]);
	}

	// --- live

	function onEvents(batch) {
		const events = batch.map(({ text }) => Object.assign(JSON.parse(text), { text }));
		for (const event of events) timeline.apply(event);
		model.events.push(...events);
		const last = events.at(-1).seq;
		summary.counts.events = Math.max(summary.counts.events, last);
		if (last > summary.run.eventSeq) { // news, not history
			const some = (kind) => events.some((event) => event.type.startsWith(kind));
			if (some("step.")) readNewSteps();
			if (some("gate.")) readGates();
			if (some("run.child")) readTree();
			readSummarySoon();
		}
		showTabs();
		opened.get(tab)?.update(events);
	}

	async function readSummary() {
		summary = await get(path`/runs/${id}/summary`);
		showHeader();
		waterfall.schedule();
		for (const listener of model.listeners) listener();
	}

	function keepStep(step) {
		model.steps.set(step.id, step);
		timeline.setStep(step);
		lastPosition = Math.max(lastPosition, step.position);
	}

	async function readSteps() {
		for (let more = true; more;) {
			const { steps, nextCursor } = await get(path`/runs/${id}/steps`, { after: lastPosition || null, limit: 500 });
			await breathe();
			steps.forEach(keepStep);
			more = nextCursor;
		}
		waterfall.schedule();
	}

	const soon = (read) => debounce(() => read().then(waterfall.schedule, laterAgain), 150);
	const readSummarySoon = soon(readSummary);
	const readNewSteps = soon(readSteps);
	const readGates = soon(async () => {
		for (const gate of (await get(path`/runs/${id}`, { include: "gates" })).gates) timeline.setGate(gate);
	});
	const readTree = soon(async () => {
		const { runs } = await get(path`/runs/${id}/tree`, { limit: 500 });
		for (const child of runs.slice(1)) timeline.setChild(child);
	});

	/** The rows that are no steps. */
	function readOthers() {
		if (summary.counts.gates) readGates();
		if (summary.counts.children) readTree();
	}

	function onState(state) {
		setMark(mark, state);
		if (state === "live" && mark.lost) {
			readSummary().catch(laterAgain);
			readOthers();
		}
		mark.lost = state !== "live";
	}

	tabs.append(...Object.keys(TABS).map(makeTab));
	tabs.addEventListener("keydown", ({ key, target }) => {
		if (key === "ArrowRight") target.nextSibling?.focus();
		if (key === "ArrowLeft") target.previousSibling?.focus();
	});
	showHeader();
	await readSteps();
	readOthers();
	await breathe();
	showTab(query.get("tab"));
	const chosen = timeline.rows.get(query.get("step"));
	if (chosen) select(chosen);
	waterfall.draw();
	model.firstSeq = Math.max(0, summary.run.eventSeq - MOST_EVENTS);
	follow(id, model.firstSeq, onEvents, onState, signal);
	let seconds = 0;
	every(async () => {
		seconds += 1;
		if (seconds % (isLive() ? 3 : 15) === 0) await readSummary();
		if (!isLive()) return;
		if (summary.counts.childrenLive && seconds % 3 === 0) readTree();
		if (tab === "timeline") waterfall.schedule();
	}, 1000, signal);

	return {
		onQuery: (parameters) => showTab(parameters.get("tab")),
		escape: () => panelOf && (closePanel(), true),
	};
}

/** The facts of a run's header. */
function aboutRun({ run, parent, cost: { own, subtree }, durationMs }, live) {
	const several = subtree?.runs > 1;
	const { costUsd, totalTokens, inputTokens, outputTokens } = several ? subtree : own;
	const budget = run.metadata?.budget ?? run.metadata?.budgetUsd ?? null;
	return [
		["Duration", live ? time(run.createdAt, "since") : duration(durationMs ?? 0)],
		["Attempt", run.maxAttempts > 1 ? `${run.attempt} of ${run.maxAttempts}` : run.attempt],
		run.queue && ["Queue", link(runsUrl({ queue: run.queue }), run.queue)],
		parent && ["Child of", link(runUrl(parent.id), parent.name ?? parent.id)],
		run.forkedFrom && ["Fork of", link(compareUrl(run.forkedFrom, run.id), run.forkedFrom)],
		run.leaseOwner && ["Owner", code(run.leaseOwner)],
		run.leaseExpiresAt && ["Lease ends", time(run.leaseExpiresAt)],
		(costUsd > 0 || totalTokens > 0) && [several ? `Cost of ${plural(subtree.runs, "run")}` : "Cost",
			el("span", { title: `${count(inputTokens)} in, ${count(outputTokens)} out; its own: ${money(own.costUsd)}` },
				money(costUsd), totalTokens > 0 && muted(` · ${compactCount(totalTokens)} tokens`))],
		budget !== null && ["Budget", typeof budget === "number" ? money(budget) : JSON.stringify(budget)],
		["Created", time(run.createdAt, "short")],
		run.completedAt && ["Ended", time(run.completedAt, "short")],
		run.deadlineAt && ["Deadline", time(run.deadlineAt, live ? "ago" : "short")],
		run.dedupeKey && ["Dedupe key", code(run.dedupeKey)],
		run.priority !== 0 && ["Priority", run.priority],
	];
}

/** Let the browser draw and take input before going on: what is long is done in slices. */
const breathe = () => new Promise((resolve) => setTimeout(resolve));
