// What is behind a run's tabs, and the panel of one step.
//
// A tab is a function of the run's model that gives {element, update?(new events)}. It is built when it is first shown, and
// keeps what it has read.

import { attempt, canWrite, get, getText, laterAgain, path, post } from "./api.js";
import { gateForm, reviewForm } from "./decide.js";
import { button, bytes, card, code, copyButton, count, debounce, duration, el, empty, facts, fill, grid, iconButton, link, meters, money, muted, plainTable, plural, searchInput,
	select, setText, show, skeleton, status, strong, time, toast } from "./dom.js";
import { items, member } from "./json.js";
import { diffTable, inlinePayload, payload, readPayload } from "./payload.js";
import { runUrl } from "./router.js";
import { VirtualRows } from "./virtual.js";
import { errorLine, outcome, shownStatus } from "./why.js";

/** A tab that is read by load(box) when it is shown, again after events of a kind, and with the summary when `watched`. */
function loadedTab(model, kind, load, watched = false) {
	const element = el("div.stack", skeleton(3));
	const again = debounce(() => load(element).catch(laterAgain), 150);
	again();
	if (watched) model.listeners.add(() => element.isConnected && again());
	return { element, update: (events) => events.some(({ type }) => kind.test(type)) && again(), again };
}

// --- one step

const REPLAY = { auto: "runs again", manual: "waits for a review", never: "never runs again" };
const ATTEMPTS = { cut: ["stalled", "cut off"], held: ["cancelled", "ended"], review: ["manual_review", "no outcome"] };

/** Attempts, contract and payloads of a step; its row is read again, since events carry no sizes. */
export function stepPanel(model, row) {
	const box = el("div.stack", skeleton(4));
	const runId = row.owner?.runId ?? model.id;
	async function load() {
		const { steps } = await get(path`/runs/${runId}/steps`, row.step ? { after: Math.max(0, row.step.position - 1), limit: 2 } : { text: row.name });
		const step = steps.find((one) => one.id === row.key);
		if (!step) return fill(box, el("p.muted", "Its row is not there yet."));
		if (runId === model.id) model.keepStep(step);
		const contract = step.resumeContract ?? {};
		const shown = (title, of) => step[`${of}Bytes`] > 0 && payload(title, runId, `step.${of}`, step.id);
		const stack = el("div");
		fill(box,
			facts([["Status", status(step.status)], ["Attempt", step.attempt], step.startedAt && ["Began", time(step.startedAt, "precise")],
				step.completedAt && ["Took", duration(new Date(step.completedAt) - new Date(step.startedAt ?? step.createdAt))], step.leaseOwner && ["Owner", code(step.leaseOwner)],
				row.copied && ["Copied", "from the run that this is a fork of"]]),
			step.status === "manual_review" && canWrite() && card("Decide it", null, reviewForm(runId, step, () => { load(); model.readSummary(); })),
			step.error && el("p.error-text", errorLine(step.error)), stack, shown("Error", "error"), shown("Output", "output"), shown("Input", "input"),
			row.attempts.length > 1 && el("section", el("h3", "Attempts"), plainTable(row.attempts.map(({ n, from, to, outcome: ended }) =>
				[n, status(...ATTEMPTS[ended] ?? [ended]), time(new Date(from).toISOString(), "precise"), el("td.num", to === null ? "…" : duration(to - from))]))),
			el("h3", "Contract"), facts([["Side effects", contract.sideEffects?.length ? contract.sideEffects.map((effect) => el("span.tag", String(effect))) : "none declared"],
				["On a crash", REPLAY[contract.replay] ?? contract.replay], contract.idempotencyKey && ["Idempotency key", code(contract.idempotencyKey), copyButton(contract.idempotencyKey, "Copy the key")],
				["Input hash", code(step.inputHash.slice(0, 12)), copyButton(step.inputHash, "Copy the input hash")]]),
			step.optionsBytes > 2 && shown("Options", "options"));
		if (step.errorBytes > 0) {
			const trace = stackOf(await readPayload(runId, "step.error", step.id));
			if (trace) fill(stack, el("section.payload", el("header", el("h3", "Stack"), copyButton(trace, "Copy the stack")), el("pre", { tabindex: 0, role: "region", "aria-label": "Stack" }, trace)));
		}
	}
	load().catch((error) => error.name !== "AbortError" && fill(box, el("div.fault", error.message)));
	return box;
}

function stackOf(text) {
	const found = member(text, "stack") ?? member(text, "traceback");
	const line = (raw) => (raw.startsWith('"') ? JSON.parse(raw) : raw);
	return found && (found.startsWith("[") ? [...items(found)].map(line).join("\n") : line(found));
}

// --- events

const KINDS = [["", "All events"], ["run.", "Run"], ["step.", "Steps"], ["step.failed", "Failed steps"], ["gate.", "Gates"], ["state.", "State"], ["usage.", "Usage"], ["signal.", "Signals"], ["recovery.", "Recovery"]];

function eventsTab(model) {
	let text = "";
	let list = [];
	let at = null;
	const search = searchInput("Filter by name or text", "Filter events", (typed) => { text = typed.toLowerCase(); refilter(); });
	const kind = select("Type", KINDS, () => refilter());
	const tally = muted();
	const table = el("table.events", el("thead", el("tr", [["seq", "#"], ["time", "Time"], ["type", "Event"], ["what", "What"]].map(([name, word]) => el(`th.e-${name}`, word)))));
	const rows = new VirtualRows(table, 4, { keyOf: (event) => event.seq, update: (row, event) => row.classList.toggle("chosen", at === event),
		make: (event) => el("tr", { onclick: () => open(event) }, el("td.e-seq", event.seq), el("td.e-time", time(event.createdAt, "precise")), el("td.e-type", button(event.type, null, "", { "data-row": "" })),
			el("td.e-what.muted", event.name && [strong(event.name), " "], describeEvent(event))) }, model.signal);
	const earlier = button("Read the 1,000 events before", readEarlier, "quiet");
	const fits = (event) => event.type.startsWith(kind.value) && (!text || event.text.toLowerCase().includes(text));

	function open(event) {
		at = event;
		rows.draw();
		model.openPanel(`${event.seq} ${event.type}`, [facts([["Time", time(event.createdAt, "precise")], event.name && ["Name", event.name], event.attempt && ["Attempt", event.attempt]]),
			event.payloadOmitted ? payload("Payload", model.id, "event", event.seq) : inlinePayload("Payload", member(event.text, "payload"), `event-${event.seq}`)], `event:${event.seq}`);
	}

	function refilter() {
		list = model.events.filter(fits);
		draw();
	}

	function draw() {
		rows.set(list);
		setText(tally, list.length === model.events.length ? plural(list.length, "event") : `${count(list.length)} of ${plural(model.events.length, "event")}`);
		show(earlier, model.firstSeq > 0);
	}

	async function readEarlier() {
		const from = Math.max(0, model.firstSeq - 1000);
		const raw = await getText(path`/runs/${model.id}/events`, { view: "light", after: from, limit: model.firstSeq - from });
		model.firstSeq = from;
		model.events.unshift(...[...items(raw)].map((one) => Object.assign(JSON.parse(one), { text: one })));
		refilter();
	}

	return {
		element: el("section.card", el("header", search, kind, tally), earlier, table),
		update(events) {
			if (events.length === 0) return refilter();
			list.push(...events.filter(fits));
			draw();
		},
	};
}

/** What an event's small payload says in a few words: its plain values, and those of what it is about. */
function describeEvent({ payload: p, payloadBytes, payloadOmitted }) {
	if (!p || typeof p !== "object") return payloadOmitted ? bytes(payloadBytes) : "";
	const about = p.usage ?? p.gate ?? p.stateVersion ?? p.signal ?? p.error ?? {};
	return [...Object.entries(p), ...Object.entries(about)].filter(([name, value]) => ["string", "number"].includes(typeof value) && !/(id|hash|at|name|token|url)$/i.test(name))
		.map(([name, value]) => `${name} ${value}`).join(" · ");
}

// --- state

function stateTab(model) {
	let versions = [];
	let at = -1;
	const range = el("input", { type: "range", min: 0, "aria-label": "Version", oninput: () => choose(Number(range.value)) });
	const about = el("div");
	const shown = el("div");
	const diff = el("div");
	const against = select("Compare with", [], () => drawDiff());
	const built = [card("State", null, el("div.slider", iconButton("chevron", "Earlier version", () => choose(at - 1), { "data-back": "" }), range, iconButton("chevron", "Later version", () => choose(at + 1))), about, shown),
		card("Changes", el("label.row", el("span", "against"), against), diff)];
	const streams = () => new Set(versions.map((version) => version.streamName)).size > 1;
	const wordOf = (version) => [streams() && version.streamName, version.version, version.label].filter(Boolean).join(" ");

	function choose(index) {
		at = Math.max(0, Math.min(versions.length - 1, index));
		const version = versions[at];
		range.value = at;
		range.setAttribute("aria-valuetext", `version ${wordOf(version)}`);
		against.value = Math.max(0, at - 1);
		fill(about, facts([["Version", `${version.version} of ${versions.length}`], streams() && ["Stream", version.streamName], version.label && ["Label", strong(version.label)],
			version.reason && ["Reason", version.reason], version.importance !== "normal" && ["Importance", version.importance], version.createdBy && ["By", version.createdBy], ["Time", time(version.createdAt, "precise")]]));
		drawSoon();
	}

	const drawSoon = debounce(() => {
		fill(shown, payload("Value", model.id, "state", versions[at].id));
		drawDiff();
	}, 40);

	async function drawDiff() {
		const [before, after] = [versions[against.value], versions[at]];
		if (before === after) return fill(diff, el("p.muted", versions.length > 1 ? "The same version." : "There is only one version."));
		fill(diff, diffTable(await readPayload(model.id, "state", before.id), await readPayload(model.id, "state", after.id)));
	}

	return loadedTab(model, /^(state|snapshot)\./, async (box) => {
		const following = at === versions.length - 1; // at the newest version: it moves on with it
		const news = [];
		for (let after = null; ;) {
			const { stateVersions, nextCursor } = await get(path`/runs/${model.id}/state/versions`, { view: "light", after, limit: 1000 });
			news.push(...stateVersions);
			if (!nextCursor) break;
			after = nextCursor;
		}
		versions = news.sort((a, b) => (a.liveVersion ?? 0) - (b.liveVersion ?? 0) || a.createdAt.localeCompare(b.createdAt));
		if (versions.length === 0) return fill(box, empty("No state", "A workflow that calls ", code("run.state.set({...})"), " shows its state here, version by version."));
		if (!box.contains(range)) fill(box, built);
		range.max = versions.length - 1;
		fill(against, versions.map((version, index) => el("option", { value: index }, wordOf(version))));
		choose(following ? versions.length - 1 : at);
	});
}

// --- gates

function gatesTab(model) {
	const tab = loadedTab(model, /^gate\./, async (box) => {
		const gates = [...items(member(await getText(path`/runs/${model.id}`, { include: "gates" }), "gates"))].map((raw) => ({ ...JSON.parse(raw), raw }));
		if (gates.length === 0) return fill(box, empty("No gates", "A decision of a person: ", code('run.gate("approve", "Send this?")'), "."));
		fill(box, gates.map((gate) => card(gate.name, el("div.row", status(gate.status === "pending" ? "waiting" : gate.status), gate.actor && `by ${gate.actor}`, time(gate.resolvedAt ?? gate.createdAt, "short")),
			gateBody(gate), gate.status === "pending" && canWrite() && gate.resolveToken && gateForm(gate, () => { tab.again(); model.readSummary(); }))));
	});
	return tab;
}

/** Prompt, data and, once decided, the answer. `gate.raw` is its text. */
export function gateBody(gate) {
	const shown = (title, name) => {
		const text = member(gate.raw, name);
		return text && text !== "null" && text !== "{}" && inlinePayload(title, text, `${gate.id}-${name}`, true);
	};
	return [el("p.prompt", gate.prompt),
		(gate.capability || gate.expiresAt) && facts([gate.capability && ["Capability", code(typeof gate.capability === "string" ? gate.capability : JSON.stringify(gate.capability))], gate.expiresAt && ["Expires", time(gate.expiresAt)]]),
		gate.dataOmitted ? payload("Data", gate.runId, "gate.data", gate.id) : shown("Data", "data"), shown("Answer", "decisionPayload"),
		gate.reviewUrl && canWrite() && el("p.row", copyButton(gate.reviewUrl, "Copy the review link", "Copy review link"), muted("Whoever has it may decide this gate, without a key."))];
}

// --- usage

function usageTab(model) {
	let subtree = null;
	const withChildren = el("input", { type: "checkbox", onchange() {
		subtree = withChildren.checked ? "true" : null;
		tab.again();
	} });
	const stepOf = (entry) => model.steps.get(entry.stepId)?.name ?? "outside of steps";
	const tokens = (number) => (number === null ? "" : count(number));
	const table = grid((entry) => entry.id, [["Time", (entry) => time(entry.createdAt, "short")], ["Step", stepOf], ["Model", (entry) => [entry.provider, entry.model].filter(Boolean).join(" ") || entry.kind],
		["Label", (entry) => entry.label ?? (entry.quantity === null ? "" : `${entry.quantity} ${entry.unit ?? ""}`)], ["In", (entry) => tokens(entry.inputTokens), "num"], ["Out", (entry) => tokens(entry.outputTokens), "num"],
		["Cost", (entry) => el("span", { title: entry.costUsd }, money(entry.costUsd)), "num"]], empty("No usage", "Recorded by ", code("run.usage.record(model=…, cost_usd=…)"), "."));
	const tab = loadedTab(model, /^usage\./, async (box) => {
		const { usage, byModel, truncated } = await get(path`/runs/${model.id}/usage`, { limit: 1000, subtree });
		const total = byModel.reduce((sum, group) => sum + Number(group.costUsd ?? 0), 0);
		const bySteps = new Map();
		for (const entry of usage) bySteps.set(stepOf(entry), (bySteps.get(stepOf(entry)) ?? 0) + Number(entry.costUsd ?? 0));
		table.set(usage);
		fill(box, el("div.spread", el("span", strong(money(total)), ` in ${plural(usage.length, "entry", "entries")}`, truncated && " (the first of more)"), model.summary.counts.children > 0 && el("label.row", withChildren, "With its children")),
			usage.length > 0 && [meters("By model", byModel.map((group) => [group.model ?? "no model", Number(group.costUsd ?? 0)])), !subtree && meters("By step", [...bySteps].sort((a, b) => b[1] - a[1]).slice(0, 30))],
			table.element);
	});
	return tab;
}

// --- children, as a tree

function childrenTab(model) {
	const folded = new Set();
	const tab = loadedTab(model, /^run\.child/, async (box) => {
		const { runs, truncated } = await get(path`/runs/${model.id}/tree`, { limit: 1000 });
		const list = [];
		const addBelow = (parent) => {
			for (const run of runs.filter((one) => one.parentRunId === parent)) {
				list.push({ ...run, below: runs.some((one) => one.parentRunId === run.id), folded: folded.has(run.id) });
				if (!folded.has(run.id)) addBelow(run.id);
			}
		};
		addBelow(model.id);
		table.set(list);
		fill(box, table.element, truncated && el("p.muted", "The first 1,000 runs of the tree."));
	}, true);
	const table = grid((run) => run.id, [
		["Child", (run) => {
			const name = el("div.unfolds", run.below && iconButton("chevron", `Children of ${run.name}`, () => {
				if (!folded.delete(run.id)) folded.add(run.id);
				tab.again();
			}, { "aria-expanded": String(!run.folded) }), link(runUrl(run.id), run.name ?? run.id));
			name.style.paddingLeft = `${run.depth * 1.3 - 0.8}rem`;
			return name;
		}], ["Status", (run) => status(shownStatus(run))], ["Workflow", (run) => run.workflowName], ["Why, or how it ended", (run) => outcome(run)], ["Created", (run) => time(run.createdAt)]],
	empty("No children", "Runs for parts of its work: ", code('run.child("name", "workflow")'), "."));
	return tab;
}

// --- webhooks

function webhooksTab(model) {
	const shownAs = ({ status: is }) => status(is === "pending" ? "waiting" : is, is);
	const open = (delivery) => model.openPanel(delivery.eventType ?? delivery.reason, [
		facts([["Status", shownAs(delivery)], ["Kind", delivery.kind], ["Tries", delivery.attempts], delivery.status === "pending" && ["Next try", time(delivery.nextAttemptAt)], delivery.httpStatus && ["HTTP", delivery.httpStatus],
			["Id", code(delivery.id), copyButton(delivery.id, "Copy the delivery's id")]]), el("p", code(delivery.url)), el("p.error-text", delivery.errorText),
		delivery.payloadBytes > 0 && payload("Body", model.id, "delivery", delivery.id), delivery.responseBytes > 0 && payload("Answer", model.id, "delivery.response", delivery.id)], `delivery:${delivery.id}`);
	const resend = async (delivery) => {
		if (await attempt(() => post(path`/runs/${model.id}/deliveries/${delivery.id}/resend`))) toast("It is sent again.");
		tab.again();
	};
	const table = grid((delivery) => delivery.id, [["Status", shownAs], ["Event", (delivery) => button(delivery.eventType ?? delivery.reason, () => open(delivery), "quiet")], ["To", (delivery) => delivery.url],
		["Tries", (delivery) => delivery.attempts], ["Answer", (delivery) => (delivery.errorText ? el("span.error-text", delivery.errorText) : delivery.httpStatus)], ["Created", (delivery) => time(delivery.createdAt)],
		["", (delivery) => canWrite() && delivery.status !== "pending" && button("Resend", () => resend(delivery)), "buttons"]],
	empty("No webhooks", "This run has no recovery webhook and no channel, or nothing has been sent yet."));
	const tab = loadedTab(model, /^(recovery|run)\./, async (box) => {
		const { deliveries, nextCursor } = await get(path`/runs/${model.id}/deliveries`, { limit: 200 });
		table.set(deliveries);
		fill(box, table.element, nextCursor && el("p.muted", "The newest 200."));
	}, true);
	return tab;
}

export const TABS = { timeline: null, events: eventsTab, state: stateTab, gates: gatesTab, usage: usageTab, children: childrenTab, webhooks: webhooksTab };
