// A run: what it is, why it waits, whether a rerun is safe, and what happened, live. And two runs side by side.
//
// The page reads a summary and the steps once, follows the run's event stream by seq, and applies each event to the
// timeline. Rows are read again only for what an event does not carry. What is open, selected and scrolled stays.

import { breathe, canWrite, compareUrl, every, follow, get, getText, laterAgain, navigate, path, post, readPages,
	runsUrl, runUrl, session, setQuery, setTitle } from "./api.js";
import { actor, gateCard, reviewForm } from "./approvals.js";
import { ask, attempt, between, button, bytes, card, code, compactCount, count, dash, debounce, duration, el, empty,
	errorText, facts, field, fill, grid, heading, icon, iconButton, idText, input, link, loading, meters, money, muted,
	number, once, options, plainTable, plural, row as inRow, searchInput, select, setMark, setState, setText, show,
	skeleton, status, strong, tag, time, toast, virtualRows } from "./dom.js";
import { bodyOf, diffTable, inlinePayload, items, jsonInput, member, payload, readPayload } from "./payload.js";
import { errorLine, isCut, outcome, runDuration, shownStatus } from "./runs.js";
import { attemptsOf, makeWaterfall, Timeline } from "./waterfall.js";

const MOST_EVENTS = 20_000; // of a longer run, the last so many are read at once

export async function runPage({ main, parts: [id], query, signal }) {
	const url = path`/runs/${id}`;
	let summary = await get(`${url}/summary`);
	let panelOf = null; // the key of what the side panel shows, if that is not the run itself
	let tab = null;
	let lastPosition = 0;
	let inVerdict = []; // actions that stand beside the verdict
	const timeline = new Timeline(session.leaseMs, id);
	// What the tabs share.
	const model = { id, url, signal, timeline, events: [], steps: new Map(), listeners: new Set(), keepStep, openPanel,
		readSummary, get summary() { return summary; } };
	const isLive = () => !summary.run.completedAt;

	const mark = el("span.mark", { role: "status" }, "loading");
	const badge = el("span");
	const why = el("p.why");
	const about = el("div");
	const verdict = el("section", { label: "Safe to rerun?", hidden: true });
	const actions = el("div.row");
	const tabs = el("nav.tabs", { role: "tablist", label: "What is known of this run" });
	const panel = el("aside.card.side", { label: "Details" });
	const content = el("div.stack", { role: "tabpanel", tabindex: "-1" });
	const { workflowName } = summary.run;
	const title = el("a", { href: runsUrl({ workflow: workflowName }) }, workflowName);
	fill(main,
		el("header.stack", el("div.spread", el("h1", title, badge), actions), el("div.spread", idText(id), mark), why, about),
		verdict, tabs, el("div.split", content, panel));

	// --- header: a part is built again when it says something else

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
		const plan = wanted ? await get(`${url}/rerun`).catch(laterAgain) : null;
		const shown = plan && plan.safe !== null;
		inVerdict = shown ? plan.actions.filter((name) => ["retry", "recover", "fork"].includes(name)) : [];
		show(verdict, shown);
		showActions();
		if (!shown) return;
		await ready;
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
				el("summary", "Decide ", strong(step.name)), errorText(errorLine(model.steps.get(step.id)?.error)),
				reviewForm(id, step, decided))),
			plan.steps.length > 0 && el("details", el("summary", "What a rerun would do, step by step"),
				plainTable(plan.steps.map(({ name, plan: kind, reason }) =>
					[name, el(`span.act.is-${kind}`, kind.replaceAll("_", " ")), muted(reason)]))));
	}

	// --- actions

	async function retry() {
		const plan = await get(`${url}/rerun`);
		const sure = plan.safe !== false || await ask("Retry all the same?", el("p", plan.verdict), "Retry", "Do not");
		if (!sure) return;
		await post(`${url}/retry`);
		toast("It is put back.");
	}

	async function recover() {
		await post(`${url}/recover`);
		toast("Its recovery webhook is on the way.");
	}

	async function cancel() {
		const asked = await ask("Cancel this run?",
			[el("p", "It ends at once; its worker is told at its next write. Completed steps stay on record."),
				field("Reason", input("reason"))], "Cancel the run", "Keep it");
		if (asked) await post(`${url}/cancel`, bodyOf({ reason: asked.reason, actor: actor() || "studio" }));
	}

	async function signalRun() {
		const asked = await ask("Send a signal", [
			field("Name", input("name", { required: true, value: summary.run.whyDetail?.signal ?? "" })),
			field("Payload", jsonInput("payload"), "JSON; empty is null")], "Send");
		if (!asked) return;
		await post(`${url}/signals`, bodyOf({ name: asked.name }, { payload: asked.payload }));
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

	function open(row) {
		if (row.kind === "run") return closePanel();
		if (row.kind === "child") return navigate(runUrl(row.key));
		if (row.kind === "gate") return showTab("gates");
		if (row.kind !== "step") return;
		waterfall.choose(row.key);
		setQuery({ step: row.key });
		openPanel(row.name, stepPanel(model, row), row.key);
	}

	// --- tabs

	const waterfall = makeWaterfall(timeline, { signal, onSelect: open, async onOpen(childId) {
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
		summary = await get(`${url}/summary`);
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
		await readPages(`${url}/steps`, "steps", { after: lastPosition || null, limit: 500 },
			(steps) => steps.forEach(keepStep));
		waterfall.schedule();
	}

	const soon = (read) => debounce(() => read().then(waterfall.schedule, laterAgain), 150);
	const readSummarySoon = soon(readSummary);
	const readNewSteps = soon(readSteps);
	const readGates = soon(async () => {
		for (const gate of (await get(url, { include: "gates" })).gates) timeline.setGate(gate);
	});
	const readTree = soon(async () => {
		const { runs } = await get(`${url}/tree`, { limit: 500 });
		for (const child of runs.slice(1)) timeline.setChild(child);
	});

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
	const ready = readSteps();
	showHeader();
	await ready;
	readOthers();
	await breathe();
	showTab(query.get("tab"));
	const chosen = timeline.rows.get(query.get("step"));
	if (chosen) open(chosen);
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

// --- tabs: functions of the run's model that give {element, update(new events)}, called when one is first shown

/** A tab that load(box) fills, again after events of a kind, with the summary when `watched`. */
function loadedTab(model, kind, load, watched = false) {
	const element = loading(load);
	const again = debounce(element.again, 150);
	if (watched) model.listeners.add(() => element.isConnected && again());
	return { element, again, update: (events) => events.some(({ type }) => kind.test(type)) && again() };
}

// --- one step

const REPLAY = { auto: "runs again", manual: "waits for a review", never: "never runs again" };
const ATTEMPT = { cut: ["stalled", "cut off"], held: ["cancelled", "ended"],
	manual_review: ["manual_review", "no outcome"] };

/** Its row is read again, since events carry no sizes. */
function stepPanel(model, row) {
	const runId = row.owner?.runId ?? model.id;
	const panel = loading(async (box) => {
		const asked = row.step ? { after: Math.max(0, row.step.position - 1), limit: 2 } : { text: row.name };
		const { steps } = await get(path`/runs/${runId}/steps`, asked);
		const step = steps.find((one) => one.id === row.key);
		if (!step) return fill(box, muted("Its row is not there yet."));
		if (runId === model.id) model.keepStep(step);
		const { sideEffects, replay, idempotencyKey } = step.resumeContract ?? {};
		const shown = (title, of) => step[`${of}Bytes`] > 2 && payload(title, runId, `step.${of}`, step.id);
		const attempts = attemptsOf(row);
		const stack = step.errorBytes > 2 && stackOf(await readPayload(runId, "step.error", step.id));
		fill(box,
			facts([["Status", status(step.status)], ["Attempt", step.attempt],
				step.startedAt && ["Began", time(step.startedAt, "precise")],
				step.completedAt && ["Took", between(step.startedAt ?? step.createdAt, step.completedAt)],
				step.leaseOwner && ["Owner", code(step.leaseOwner)],
				row.copied && ["Copied", "from the run that this is a fork of"]]),
			step.status === "manual_review" && canWrite() && card("Decide it", null, reviewForm(runId, step, () => {
				panel.again();
				model.readSummary();
			})),
			step.error && errorText(errorLine(step.error)),
			stack && inlinePayload("Stack", stack, `${step.id}-stack`),
			shown("Error", "error"), shown("Output", "output"), shown("Input", "input"),
			attempts.length > 1 && plainTable(attempts.map(({ n, from, to, kind }) => [n, status(...ATTEMPT[kind] ?? [kind]),
				time(from, "precise"), number(to === null ? "…" : duration(to - from))]),
			["Attempt", "Outcome", "Began", "Took"]),
			el("h3", "Contract"),
			facts([["Side effects", sideEffects?.length ? sideEffects.map((effect) => tag(String(effect))) : "none declared"],
				["On a crash", REPLAY[replay] ?? replay],
				idempotencyKey && ["Idempotency key", idText(idempotencyKey)],
				["Input hash", idText(step.inputHash, step.inputHash.slice(0, 12))]]),
			shown("Options", "options"));
	}, 4);
	return panel;
}

function stackOf(text) {
	const found = member(text, "stack") ?? member(text, "traceback");
	const line = (raw) => (raw.startsWith('"') ? JSON.parse(raw) : raw);
	return found && (found.startsWith("[") ? items(found).map(line).join("\n") : line(found));
}

// --- events

function eventsTab(model) {
	let filter = "";
	let list = [];
	let chosen = null;
	const search = searchInput("Filter by type, name or text", "Filter events", (text) => {
		filter = text.toLowerCase();
		refilter();
	});
	const tally = muted();
	const heads = [["seq", "#"], ["time", "Time"], ["type", "Event"], ["what", "What"]];
	const table = el("table.events", el("thead", el("tr", heads.map(([name, word]) => el(`th.e-${name}`, word)))));
	const rows = virtualRows(table, 4, {
		keyOf: (event) => event.seq,
		make: (event) => el("tr", { onclick: () => open(event) }, el("td.e-seq", event.seq),
			el("td.e-time", time(event.createdAt, "precise")),
			el("td.e-type", button(event.type, null, "", { "data-row": "" })),
			el("td.e-what.muted", event.name && [strong(event.name), " "], describeEvent(event))),
		update: (row, event) => row.classList.toggle("chosen", chosen === event),
	}, model.signal);
	const fits = ({ text }) => text.toLowerCase().includes(filter);

	function open(event) {
		chosen = event;
		rows.draw();
		const { seq, type, text, name, createdAt, payloadOmitted } = event;
		model.openPanel(`${seq} ${type}`, [
			facts([["Time", time(createdAt, "precise")], name && ["Name", name], event.attempt && ["Attempt", event.attempt]]),
			payloadOmitted ? payload("Payload", model.id, "event", seq)
				: inlinePayload("Payload", member(text, "payload"), `event-${seq}`)], `event:${seq}`);
	}

	function refilter() {
		list = model.events.filter(fits);
		draw();
	}

	function draw() {
		rows.set(list);
		const all = plural(model.events.length, "event") + (model.firstSeq > 0 ? ", the last ones" : "");
		setText(tally, list.length === model.events.length ? all : `${count(list.length)} of ${all}`);
	}

	return {
		element: el("section.card", el("header", search, tally), table),
		update(events) {
			if (events.length === 0) return refilter();
			list.push(...events.filter(fits));
			draw();
		},
	};
}

/** The plain values of an event's small payload, and of what it is about. */
function describeEvent({ payload: whole, payloadBytes, payloadOmitted }) {
	if (typeof whole !== "object" || !whole) return payloadOmitted ? bytes(payloadBytes) : "";
	const about = whole.usage ?? whole.gate ?? whole.stateVersion ?? whole.signal ?? whole.error ?? {};
	return [...Object.entries(whole), ...Object.entries(about)].filter(([name, value]) =>
		["string", "number"].includes(typeof value) && !/(id|hash|at|name|token|url)$/i.test(name))
		.map(([name, value]) => `${name} ${value}`).join(" · ");
}

// --- state

function stateTab(model) {
	let versions = [];
	let at = -1;
	const slider = input(null,
		{ type: "range", min: 0, label: "Version", oninput: () => choose(Number(slider.value)) });
	const [about, shown, diff] = [el("div"), el("div"), el("div")];
	const against = select("Compare with", [], () => drawDiff());
	const built = [card("State", null, el("div.slider",
		iconButton("chevron", "Earlier version", () => choose(at - 1), { "data-back": "" }), slider,
		iconButton("chevron", "Later version", () => choose(at + 1))), about, shown),
	card("Changes", el("label.row", el("span", "against"), against), diff)];
	const severalStreams = () => new Set(versions.map(({ streamName }) => streamName)).size > 1;
	const wordOf = ({ streamName, version, label }) =>
		[severalStreams() && streamName, version, label].filter(Boolean).join(" ");

	function choose(index) {
		at = Math.max(0, Math.min(versions.length - 1, index));
		const { streamName, version, label, reason, createdBy, createdAt } = versions[at];
		slider.value = at;
		slider.setAttribute("aria-valuetext", `version ${wordOf(versions[at])}`);
		against.value = Math.max(0, at - 1);
		fill(about, facts([["Version", `${version} of ${versions.length}`], severalStreams() && ["Stream", streamName],
			label && ["Label", strong(label)], reason && ["Reason", reason], createdBy && ["By", createdBy],
			["Time", time(createdAt, "precise")]]));
		drawSoon();
	}

	const drawSoon = debounce(() => {
		fill(shown, payload("Value", model.id, "state", versions[at].id));
		drawDiff();
	}, 40);

	async function drawDiff() {
		const pair = [versions[against.value], versions[at]];
		if (pair[0] === pair[1]) return fill(diff, muted(versions.length > 1 ? "The same version." : "There is only one."));
		const [before, after] = await Promise.all(pair.map(({ id }) => readPayload(model.id, "state", id)));
		fill(diff, diffTable(before, after));
	}

	return loadedTab(model, /^(state|snapshot)\./, async (box) => {
		const found = [];
		await readPages(`${model.url}/state/versions`, "stateVersions", { view: "light", limit: 1000 },
			(some) => found.push(...some));
		const following = at === versions.length - 1; // at the newest version: it moves on with it
		versions = found.sort((one, other) => (one.liveVersion ?? 0) - (other.liveVersion ?? 0)
			|| one.createdAt.localeCompare(other.createdAt));
		if (versions.length === 0) {
			return fill(box, empty("No state", "A workflow that calls ", code("run.state.set({...})"),
				" shows its state here, version by version."));
		}
		if (!box.contains(slider)) fill(box, built);
		slider.max = versions.length - 1;
		fill(against, options(versions.map((version, index) => [index, wordOf(version)])));
		choose(following ? versions.length - 1 : at);
	});
}

// --- gates

function gatesTab(model) {
	const tab = loadedTab(model, /^gate\./, async (box) => {
		const gates = items(member(await getText(model.url, { include: "gates" }), "gates"));
		const decided = () => {
			tab.again();
			model.readSummary();
		};
		fill(box, gates.map((raw) => gateCard({ ...JSON.parse(raw), raw }, decided)), gates.length === 0
			&& empty("No gates", "A decision of a person: ", code('run.gate("approve", "Send this?")'), "."));
	});
	return tab;
}

// --- usage

function usageTab(model) {
	const withChildren = input(null, { type: "checkbox", onchange: () => tab.again() });
	const stepOf = (entry) => model.steps.get(entry.stepId)?.name ?? "outside of steps";
	const tokens = (many) => (many === null ? "" : count(many));
	const table = grid((entry) => entry.id, [
		["Time", ({ createdAt }) => time(createdAt, "short")], ["Step", stepOf],
		["Model", ({ provider, model: name, kind }) => [provider, name].filter(Boolean).join(" ") || kind],
		["Label", ({ label, quantity, unit }) => label ?? (quantity === null ? "" : `${quantity} ${unit ?? ""}`)],
		["In", ({ inputTokens }) => tokens(inputTokens), "num"], ["Out", ({ outputTokens }) => tokens(outputTokens), "num"],
		["Cost", ({ costUsd }) => el("span", { title: costUsd }, money(costUsd)), "num"],
	], empty("No usage", "Recorded by ", code("run.usage.record(model=…, cost_usd=…)"), "."));
	const tab = loadedTab(model, /^usage\./, async (box) => {
		const asked = { limit: 1000, subtree: withChildren.checked ? "true" : null };
		const { usage, byModel, truncated } = await get(`${model.url}/usage`, asked);
		const total = byModel.reduce((sum, { costUsd }) => sum + Number(costUsd), 0);
		const bySteps = new Map();
		for (const entry of usage) {
			bySteps.set(stepOf(entry), (bySteps.get(stepOf(entry)) ?? 0) + Number(entry.costUsd ?? 0));
		}
		const dearest = [...bySteps].sort((one, other) => other[1] - one[1]).slice(0, 30);
		table.set(usage);
		fill(box,
			el("div.spread", el("span", strong(money(total)), ` in ${plural(usage.length, "entry", "entries")}`,
				truncated && " (the first of more)"),
			model.summary.counts.children > 0 && el("label.row", withChildren, "With its children")),
			usage.length > 0 && [meters("By model", byModel.map((group) => [group.model ?? "no model", Number(group.costUsd)])),
				!withChildren.checked && meters("By step", dearest)],
			table);
	});
	return tab;
}

// --- children, as a tree

function childrenTab(model) {
	const folded = new Set();
	const table = grid((run) => run.id, [
		["Child", ({ id, name, depth, open, parent }) => {
			const fold = parent && iconButton("chevron", `Children of ${name}`, () => {
				if (!folded.delete(id)) folded.add(id);
				tab.again();
			}, { "aria-expanded": String(open) });
			return el("div.unfolds", { style: { paddingLeft: `${depth * 1.3 - 0.8}rem` } }, fold, link(runUrl(id), name ?? id));
		}], ["Status", (run) => status(shownStatus(run))], ["Workflow", ({ workflowName }) => workflowName],
		["Why, or how it ended", outcome], ["Created", ({ createdAt }) => time(createdAt)],
	], empty("No children", "Runs for parts of its work: ", code('run.child("name", "workflow")'), "."));
	const tab = loadedTab(model, /^run\.child/, async (box) => {
		const { runs, truncated } = await get(`${model.url}/tree`, { limit: 1000 });
		const below = Map.groupBy(runs, (run) => run.parentRunId);
		const branch = (id) => (below.get(id) ?? []).flatMap((run) => {
			const open = !folded.has(run.id);
			return [{ ...run, open, parent: below.has(run.id) }, ...open ? branch(run.id) : []];
		});
		table.set(branch(model.id));
		fill(box, table, truncated && muted("The first 1,000 runs of the tree."));
	}, true);
	return tab;
}

// --- webhooks

function webhooksTab(model) {
	const shownAs = ({ status: is }) => status(is === "pending" ? "waiting" : is, is);
	const nameOf = ({ eventType, reason }) => eventType ?? reason;
	function open(delivery) {
		const { id, kind, attempts, nextAttemptAt, httpStatus, url, payloadBytes, responseBytes } = delivery;
		model.openPanel(nameOf(delivery), [
			facts([["Status", shownAs(delivery)], ["Kind", kind], ["Tries", attempts],
				delivery.status === "pending" && ["Next try", time(nextAttemptAt)], httpStatus && ["HTTP", httpStatus],
				["Id", idText(id)]]),
			el("p", code(url)), errorText(delivery.errorText),
			payloadBytes > 0 && payload("Body", model.id, "delivery", id),
			responseBytes > 0 && payload("Answer", model.id, "delivery.response", id)], `delivery:${id}`);
	}
	async function resend({ id }) {
		if (await attempt(() => post(`${model.url}/deliveries/${id}/resend`))) toast("It is sent again.");
		tab.again();
	}
	const table = grid((delivery) => delivery.id, [
		["Status", shownAs], ["Event", (delivery) => button(nameOf(delivery), () => open(delivery), "quiet")],
		["To", ({ url }) => url], ["Tries", ({ attempts }) => attempts],
		["Answer", ({ errorText: refused, httpStatus }) => (refused ? el("span.error-text", refused) : httpStatus)],
		["Created", ({ createdAt }) => time(createdAt)],
		canWrite() && ["", (delivery) => delivery.status !== "pending"
			&& button("Resend", () => resend(delivery)), "buttons"],
	], empty("No webhooks", "It has no recovery webhook and no channel, or nothing was sent yet."));
	const tab = loadedTab(model, /^(recovery|run)\./, async (box) => {
		const { deliveries, nextCursor } = await get(`${model.url}/deliveries`, { limit: 200 });
		table.set(deliveries);
		fill(box, table, nextCursor && muted("The newest 200."));
	}, true);
	return tab;
}

const TABS = { timeline: null, events: eventsTab, state: stateTab, gates: gatesTab, usage: usageTab,
	children: childrenTab, webhooks: webhooksTab };

// --- fork from a step, with a preview of what is reused; and two runs side by side

const LONGEST = 65_536; // bytes of an output that is compared by itself, of so many steps
const MOST = 200;
const MOST_NAMES = 12; // in a line

const listed = (names) => names.slice(0, MOST_NAMES).join(", ")
	+ (names.length > MOST_NAMES ? ` and ${names.length - MOST_NAMES} more` : "");

/** Ask from where to fork, with what input. Resolves to the new run, or null. */
async function askFork({ run }, steps, inputText) {
	steps.sort((one, other) => one.position - other.position);
	const preview = el("div", { role: "status" });
	const note = muted("The input is another one: reused steps keep what they returned for the old one.");
	const from = el("select", { name: "fromStep", onchange: draw },
		options([...steps.map(({ name }) => [name, name]), ["", "the end: reuse all completed steps"]]));
	from.value = (steps.find((step) => step.status !== "completed") ?? steps.at(-1))?.name ?? "";
	const payload = jsonInput("input", { value: inputText });
	payload.addEventListener("input", draw);
	function draw() {
		const cut = from.value ? steps.findIndex((step) => step.name === from.value) : steps.length;
		const kept = steps.filter((step, index) => index < cut && step.status === "completed");
		const again = steps.filter((step) => !kept.includes(step));
		fill(preview, facts([["Reused", kept], ["Runs again", again]].map(([word, some]) =>
			[`${word}: ${plural(some.length, "step")}`, listed(some.map(({ name }) => name))])));
		show(note, kept.length > 0 && payload.value !== inputText);
	}
	draw();
	const values = await ask("Fork this run", [
		el("p", "A new run of the same workflow. It begins with copies of the checkpoints before the step that you choose."),
		field("Run again from", from), preview, field("Input", payload), note,
	], "Fork");
	if (!values) return null;
	const body = bodyOf({ fromStep: values.fromStep }, { input: values.input === inputText ? null : values.input });
	return (await post(path`/runs/${run.id}/fork`, body)).run;
}

export async function comparePage({ main, query, signal }) {
	const sides = ["a", "b"].map((name) => ({ id: query.get(name), steps: new Map(), head: el("div", skeleton(2)) }));
	const [first, second] = sides;
	const outputs = new Map(); // step name -> how the outputs compare, once they were read
	const tally = el("p.muted", { role: "status" });
	const details = el("div");
	const cell = (step) => (step ? inRow(status(step.status), muted(step.copied ? "reused"
		: step.completedAt && step.startedAt && between(step.startedAt, step.completedAt))) : dash());
	const table = grid(({ name }) => name, [
		["Step", ({ name }) => name], ["First", ({ pair }) => cell(pair[0])], ["Second", ({ pair }) => cell(pair[1])],
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
		fill(side.head, card(title, status(shownStatus(run)), idText(run.id), facts([["Duration", runDuration(run)],
			["Cost", money(cost.own.costUsd)], ["Created", time(run.createdAt)]]), muted(outcome(run))));
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
		setText(tally, differing.length ? `${differing.length} of ${all} differ: ${listed(differing)}`
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
