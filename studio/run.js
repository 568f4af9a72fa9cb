// A run: what it is, why it waits, whether a rerun is safe, and what happened, live.
//
// The page reads a summary and the steps once, follows the run's event stream by seq, and applies each event to the
// timeline. Rows are read again only for what an event does not carry. What is open, selected and scrolled stays.

import { attempt, canWrite, every, follow, get, laterAgain, path, post, query as toQuery, session } from "./api.js";
import { actor, bodyOf, jsonInput, reviewForm } from "./decide.js";
import { ask, button, code, compactCount, count, debounce, duration, el, facts, field, fill, icon, iconButton, idText, link, money, muted, plainTable, plural, setMark, setText, show, status, strong,
	time, toast } from "./dom.js";
import { payload, readPayload } from "./payload.js";
import { navigate, runsUrl, runUrl, setQuery, setTitle } from "./router.js";
import { stepPanel, TABS } from "./tabs.js";
import { Timeline, Waterfall } from "./waterfall.js";
import { outcome, shownStatus } from "./why.js";

const MOST_EVENTS = 20_000; // of a longer run, the last so many are read at once
const LIVE = new Set(["pending", "queued", "running", "waiting"]);

export async function open({ main, parts: [id], query, signal }) {
	let summary = await get(path`/runs/${id}/summary`);
	let panelOf = null;
	let tab = null;
	let lastPosition = 0;
	let inVerdict = []; // actions that stand beside the verdict
	const timeline = new Timeline(session.leaseMs);
	/** What the tabs share. */
	const model = { id, signal, timeline, events: [], steps: new Map(), listeners: new Set(), keepStep, openPanel, readSummary, get summary() { return summary; } };

	const mark = el("span.mark", { role: "status" }, "loading");
	const badge = el("span");
	const why = el("p.why");
	const about = el("div");
	const verdict = el("section.card.verdict", { "aria-label": "Safe to rerun?", hidden: true });
	const actions = el("div.row");
	const tabs = el("nav.tabs", { role: "tablist", "aria-label": "What is known of this run" });
	const panel = el("aside.card.side", { "aria-label": "Details" });
	const content = el("div.stack", { role: "tabpanel", tabindex: "-1" });
	const { workflowName, forkedFrom } = summary.run;
	fill(main,
		el("nav.crumbs", { "aria-label": "Where" }, el("a", { href: "/studio/runs" }, "Runs"), "/", el("a", { href: runsUrl({ workflow: workflowName }) }, workflowName),
			summary.parent && ["/ child of ", link(runUrl(summary.parent.id), summary.parent.name ?? summary.parent.id)],
			forkedFrom && ["/ fork of ", link(runUrl(forkedFrom), forkedFrom), link(compareUrl(forkedFrom, id), "compare")],
			el("span.grow"), mark),
		el("header.stack", el("div.spread", el("h1", workflowName, badge), actions), idText(id), why, about), verdict, tabs, el("div.split", content, panel));

	// --- header

	function showHeader() {
		const { run } = summary;
		const shown = shownStatus(run);
		timeline.setRun(run);
		setTitle(`${workflowName} ${shown}`);
		once(badge, shown, () => {
			fill(badge, status(shown));
			readVerdict();
		});
		// Times keep themselves up to date: the line is built again only when it says something else.
		once(why, [shown, run.whyDetail, run.error, run.cancelReason], () => {
			const line = outcome(run);
			why.className = `why why-${shown}`;
			show(why, Boolean(line));
			fill(why, el("span", line));
		});
		once(about, [run, summary.cost], () => fill(about, facts(factRows())));
		showActions();
		showTabs();
		if (!panelOf) showRunPanel();
	}

	function factRows() {
		const { run: r, cost } = summary;
		const live = LIVE.has(r.status);
		const more = cost.subtree?.runs > 1;
		const spent = more ? cost.subtree : cost.own;
		const budget = r.metadata?.budget ?? r.metadata?.budgetUsd;
		return [
			["Duration", live ? time(r.createdAt, "since") : duration(summary.durationMs ?? 0)],
			["Attempt", r.maxAttempts > 1 ? `${r.attempt} of ${r.maxAttempts}` : r.attempt],
			r.queue && ["Queue", link(runsUrl({ queue: r.queue }), r.queue)],
			r.leaseOwner && ["Owner", code(r.leaseOwner)],
			r.leaseExpiresAt && ["Lease ends", time(r.leaseExpiresAt)],
			(Number(spent?.costUsd) > 0 || spent?.totalTokens > 0) && [more ? `Cost of ${plural(cost.subtree.runs, "run")}` : "Cost",
				el("span", { title: `${count(spent.inputTokens ?? 0)} in, ${count(spent.outputTokens ?? 0)} out; its own: ${money(cost.own.costUsd)}` },
					money(spent.costUsd), spent.totalTokens > 0 && muted(` · ${compactCount(spent.totalTokens)} tokens`))],
			budget !== undefined && budget !== null && ["Budget", typeof budget === "number" ? money(budget) : JSON.stringify(budget)],
			["Created", time(r.createdAt, "short")], r.completedAt && ["Ended", time(r.completedAt, "short")], r.deadlineAt && ["Deadline", time(r.deadlineAt, live ? "ago" : "short")],
			r.dedupeKey && ["Dedupe key", code(r.dedupeKey)], r.priority !== 0 && ["Priority", r.priority], r.failureClass && ["Failure class", el("span.tag", r.failureClass)],
		];
	}

	const ACTIONS = {
		retry: ["Retry", retry], recover: ["Recover", recover], signal: ["Signal", signalRun], fork: ["Fork", forkRun], cancel: ["Cancel", cancel, "danger"],
	};
	const actionButton = (name, kind) => button(ACTIONS[name][0], async () => {
		await attempt(ACTIONS[name][1]);
		readSummary().catch(laterAgain);
	}, ACTIONS[name][2] ?? kind);

	function showActions() {
		if (!canWrite()) return;
		const { run: r } = summary;
		const live = LIVE.has(r.status);
		const ended = r.status === "failed" || r.status === "cancelled";
		const wanted = [ended && "retry", (ended || r.stalled) && r.recoveryWebhook && "recover", live && "signal", "fork", live && "cancel"].filter((name) => name && !inVerdict.includes(name));
		once(actions, wanted, () => fill(actions, wanted.map((name) => actionButton(name))));
	}

	async function readVerdict() {
		const { run } = summary;
		const wanted = ["failed", "cancelled", "stalled"].includes(shownStatus(run)) || run.whyDetail?.kind === "lease_expired";
		const plan = wanted ? await get(path`/runs/${id}/rerun`).catch(laterAgain) : null;
		const shown = plan && plan.safe !== null;
		inVerdict = shown ? plan.actions.filter((name) => ["retry", "recover", "fork"].includes(name)) : [];
		show(verdict, shown);
		showActions();
		if (!shown) return;
		const blocking = canWrite() ? plan.steps.filter((step) => step.plan === "stops_for_review") : [];
		verdict.classList.toggle("safe", plan.safe);
		fill(verdict, el("div.spread", el("h2", icon(plan.safe ? "completed" : "stalled"), el("span", plan.verdict)), canWrite() && el("div.row", inVerdict.map((name, index) => actionButton(name, index === 0 && plan.safe ? "primary" : "")))),
			blocking.map((step) => el("details", { open: blocking.length === 1 }, el("summary", "Decide ", strong(step.name)), reviewForm(id, step, () => { readVerdict(); readSummary(); }))),
			plan.steps.length > 0 && el("details", el("summary", "What a rerun would do, step by step"),
				plainTable(plan.steps.map((step) => [step.name, el(`span.act.act-${step.plan}`, step.plan.replaceAll("_", " ")), el("td.muted", step.reason)]))));
	}

	// --- actions

	async function retry() {
		const plan = await get(path`/runs/${id}/rerun`);
		if (plan.safe === false && !await ask("Retry all the same?", el("p", plan.verdict), "Retry", { kind: "danger", otherwise: "Do not" })) return;
		await post(path`/runs/${id}/retry`);
		toast("It is put back.");
	}

	async function recover() {
		await post(path`/runs/${id}/recover`);
		toast("Its recovery webhook is on the way.");
	}

	async function cancel() {
		const asked = await ask("Cancel this run?", [el("p", "It ends at once; its worker is told at its next write. Completed steps stay on record."), field("Reason", el("input", { name: "reason" }))],
			"Cancel the run", { kind: "danger", otherwise: "Keep it" });
		if (asked) await post(path`/runs/${id}/cancel`, bodyOf({ reason: asked.reason, actor: actor() || "studio" }));
	}

	async function signalRun() {
		const asked = await ask("Send a signal", [field("Name", el("input", { name: "name", required: true, value: summary.run.whyDetail?.signal ?? "" })), field("Payload", jsonInput("payload"), "JSON; empty is null")], "Send");
		if (!asked) return;
		await post(path`/runs/${id}/signals`, bodyOf({ name: asked.name }, { payload: asked.payload }));
		toast("The signal is sent.");
	}

	async function forkRun() {
		const { askFork } = await import("./compare.js");
		const fork = await askFork(summary, [...model.steps.values()], summary.run.inputBytes > 0 ? await readPayload(id, "input") : "{}");
		if (fork) navigate(compareUrl(id, fork.id));
	}

	// --- the side panel: one step, event or delivery, else the run's own payloads

	function openPanel(title, nodes, key) {
		panelOf = key;
		fill(panel, el("header", el("h2", { title }, title), iconButton("close", "Close details", closePanel)), el("div.body.stack", nodes));
		panel.classList.add("opened");
		panel.scrollTop = 0;
	}

	function closePanel() {
		panelOf = null;
		panel.said = null;
		panel.classList.remove("opened");
		waterfall.choose(null);
		setQuery({ step: null });
		showRunPanel();
	}

	function showRunPanel() {
		const { run: r } = summary;
		const failed = r.status === "failed";
		const kinds = [failed && ["Error", "error"], ["Result", "result"], ["Input", "input"], r.metadataBytes > 2 && ["Metadata", "metadata"], !failed && ["Error of an earlier attempt", "error"]]
			.filter((kind) => kind && r[`${kind[1]}Bytes`] > 0);
		once(panel, kinds.map(([word, of]) => [word, r[`${of}Bytes`]]), () => fill(panel, el("header", el("h2", "The run")),
			el("div.body.stack", kinds.map(([word, of]) => payload(word, id, of)), kinds.length === 0 && el("p.muted", "It has no input and no result yet."))));
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

	const waterfall = new Waterfall(timeline, { signal, onSelect: select, async onOpen(childId) {
		const [child, { steps }] = await Promise.all([get(path`/runs/${childId}/summary`), get(path`/runs/${childId}/steps`, { limit: 500 })]);
		const own = new Timeline(session.leaseMs, childId);
		own.setRun(child.run);
		steps.forEach((step) => own.setStep(step));
		return own;
	} });
	const opened = new Map([["timeline", { element: waterfall.element, update: () => waterfall.schedule() }]]);

	function showTabs() {
		const { counts } = summary;
		const list = [["timeline", "Timeline", counts.steps], ["events", "Events", counts.events], ["state", "State", summary.state?.version], ["gates", "Gates", counts.gates],
			["usage", "Usage", counts.usage], ["children", "Children", counts.children], ["webhooks", "Webhooks", counts.deliveries]];
		if (!tabs.firstChild) {
			tabs.append(...list.map(([name, word]) => el("a", { href: runUrl(id, name === "timeline" ? "" : `?tab=${name}`), role: "tab", id: `tab-${name}`, onclick(event) {
				event.preventDefault();
				showTab(name);
			} }, word, el("span"))));
			tabs.addEventListener("keydown", ({ key, target }) => (key === "ArrowRight" ? target.nextSibling : key === "ArrowLeft" ? target.previousSibling : null)?.focus());
		}
		list.forEach(([name, , number], index) => {
			const link = tabs.children[index];
			link.setAttribute("aria-selected", String(name === tab));
			link.tabIndex = name === tab ? 0 : -1;
			setText(link.lastChild, number ? compactCount(number) : "");
		});
	}

	function showTab(name) {
		if (!TABS[name ?? ""]) name = "timeline";
		if (name === tab) return;
		tab = name;
		setQuery({ tab: name === "timeline" ? null : name });
		if (!opened.has(name)) opened.set(name, TABS[name](model));
		fill(content, opened.get(name).element);
		content.setAttribute("aria-labelledby", `tab-${name}`);
		if (panelOf) closePanel();
		showTabs();
		document.getElementById(`tab-${name}`).scrollIntoView({ block: "nearest", inline: "nearest" });
		opened.get(name).update?.([]);
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
		opened.get(tab)?.update?.(events);
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

	const soon = (read, wait) => debounce(() => read().catch(laterAgain), wait);
	const readSummarySoon = soon(readSummary, 250);
	const readNewSteps = soon(readSteps, 250);
	const readGates = soon(async () => {
		(await get(path`/runs/${id}`, { include: "gates" })).gates.forEach((gate) => timeline.setGate(gate));
		waterfall.schedule();
	}, 60);
	const readTree = soon(async () => {
		(await get(path`/runs/${id}/tree`, { limit: 500 })).runs.slice(1).forEach((child) => timeline.setChild(child));
		waterfall.schedule();
	}, 60);

	function onState(state) {
		setMark(mark, state);
		if (state === "live" && mark.lost) readSummary().catch(laterAgain);
		mark.lost = state !== "live";
	}

	showHeader();
	await readSteps();
	if (summary.counts.gates) readGates();
	if (summary.counts.children) readTree();
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
		const live = LIVE.has(summary.run.status);
		if (seconds % (live ? 3 : 15) === 0) await readSummary();
		if (live && summary.counts.childrenLive && seconds % 3 === 0) readTree();
		if (live && tab === "timeline") waterfall.schedule();
	}, 1000, signal);

	return {
		onQuery: (parameters) => showTab(parameters.get("tab")),
		escape: () => panelOf && (closePanel(), true),
	};
}

const compareUrl = (a, b) => `/studio/compare${toQuery({ a, b })}`;

/** Let the browser draw and take input before going on: what is long is done in slices. */
const breathe = () => new Promise((resolve) => setTimeout(resolve));

/** Do something with a node only when what it is made from is not what it was made from. */
function once(node, source, action) {
	const said = JSON.stringify(source);
	if (node.said === said) return;
	node.said = said;
	action();
}
