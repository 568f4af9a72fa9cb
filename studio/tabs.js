// What is behind a run's tabs, and the panel of one step.
//
// A tab is a function of the run's model that gives {element, update(new events)}. It is built when it is first shown,
// and keeps what it has read.

import { canWrite, get, getText, path, post, runUrl } from "./api.js";
import { gateCard, reviewForm } from "./approvals.js";
import { attempt, between, button, bytes, card, code, count, debounce, duration, el, empty, errorText, facts, fill,
	grid, iconButton, idText, input, link, loading, meters, money, muted, number, options, plainTable, plural, searchInput,
	select, setText, status, strong, tag, time, toast, virtualRows } from "./dom.js";
import { diffTable, inlinePayload, items, member, payload, readPayload } from "./payload.js";
import { errorLine, outcome, shownStatus } from "./runs.js";
import { attemptsOf } from "./waterfall.js";

/** A tab that load(box) fills, again after events of a kind, and with the summary when `watched`. */
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

/** Attempts, contract and payloads of a step; its row is read again, since events carry no sizes. */
export function stepPanel(model, row) {
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

/** What an event's small payload says in a few words: its plain values, and those of what it is about. */
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
		{ type: "range", min: 0, "aria-label": "Version", oninput: () => choose(Number(slider.value)) });
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
		const following = at === versions.length - 1; // at the newest version: it moves on with it
		const found = [];
		for (let after = null, more = true; more; more = after) {
			const answer = await get(path`/runs/${model.id}/state/versions`, { view: "light", after, limit: 1000 });
			found.push(...answer.stateVersions);
			after = answer.nextCursor;
		}
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
		const gates = items(member(await getText(path`/runs/${model.id}`, { include: "gates" }), "gates"));
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
		const { usage, byModel, truncated } = await get(path`/runs/${model.id}/usage`, asked);
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
		const { runs, truncated } = await get(path`/runs/${model.id}/tree`, { limit: 1000 });
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
		if (await attempt(() => post(path`/runs/${model.id}/deliveries/${id}/resend`))) toast("It is sent again.");
		tab.again();
	}
	const table = grid((delivery) => delivery.id, [
		["Status", shownAs], ["Event", (delivery) => button(nameOf(delivery), () => open(delivery), "quiet")],
		["To", ({ url }) => url], ["Tries", ({ attempts }) => attempts],
		["Answer", ({ errorText: refused, httpStatus }) => (refused ? el("span.error-text", refused) : httpStatus)],
		["Created", ({ createdAt }) => time(createdAt)],
		canWrite() && ["", (delivery) => delivery.status !== "pending"
			&& button("Resend", () => resend(delivery)), "buttons"],
	], empty("No webhooks", "This run has no recovery webhook and no channel, or nothing has been sent yet."));
	const tab = loadedTab(model, /^(recovery|run)\./, async (box) => {
		const { deliveries, nextCursor } = await get(path`/runs/${model.id}/deliveries`, { limit: 200 });
		table.set(deliveries);
		fill(box, table, nextCursor && muted("The newest 200."));
	}, true);
	return tab;
}

export const TABS = { timeline: null, events: eventsTab, state: stateTab, gates: gatesTab, usage: usageTab,
	children: childrenTab, webhooks: webhooksTab };
