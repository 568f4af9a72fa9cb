// What the tabs of a run show, beside the timeline: functions of the run (LiveRun) and the side panel that give
// {element, update(events)}. update gets new events, none when the tab is opened again, and null when the summary was
// read. And the panel of one step.

import { canWrite, get, post, readPages, runUrl } from "./api.js";
import { gateCard, reviewForm } from "./approvals.js";
import { between, button, bytes, card, code, count, dash, debounce, duration, el, empty, errorText, facts, fill,
	grid, iconButton, idText, input, link, loading, meters, money, muted, number, once, options, plainTable, plural, searchInput,
	select, setText, show, status, strong, tag, time, toast, virtualRows } from "./dom.js";
import { diffTable, inlinePayload, items, member, payload, readPayload } from "./payload.js";
import { errorLine, outcome, runStatus } from "./runs.js";
import { attemptsOf, WORDS } from "./waterfall.js";

export const TABS = { events: eventsTab, state: stateTab, gates: gatesTab, usage: usageTab, children: childrenTab,
	webhooks: webhooksTab };

/** A tab that load(box) fills, again after events of a kind, and with each summary when `watched`. */
function loadedTab(kind, load, watched = false) {
	const element = loading(load);
	const again = debounce(element.again, 150);
	const concerns = (events) => (events?.length ? events.some(({ type }) => kind.test(type)) : events || watched);
	return { element, again, update: (events) => concerns(events) && again() };
}

// --- events

function eventsTab(run, panel) {
	let filter = "";
	let chosen = null;
	const search = searchInput("Filter by type, name or text", "Filter events", (text) => {
		filter = text.toLowerCase();
		update();
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
	}, run.signal);

	function open(event) {
		chosen = event;
		rows.draw();
		const { seq, type, text, name, attempt, createdAt, payloadOmitted } = event;
		panel.open(`${seq} ${type}`, [
			facts({ Time: time(createdAt, "precise"), Name: name, Attempt: attempt }),
			payloadOmitted ? payload("Payload", run.id, "event", seq)
				: inlinePayload("Payload", member(text, "payload"), `event-${seq}`)]);
	}

	function update() {
		const { events, firstSeq } = run;
		const list = filter ? events.filter(({ text }) => text.toLowerCase().includes(filter)) : events;
		rows.set(list);
		const all = plural(events.length, "event") + (firstSeq > 0 ? ", the last ones" : "");
		setText(tally, filter ? `${count(list.length)} of ${all}` : all);
	}

	const element = el("section.card", el("header", search, tally), table);
	queueMicrotask(update); // when it stands on the page
	return { element, update: (events) => events && update() };
}

/** The plain values of its payload, and of what it is about. */
function describeEvent({ payload: whole, payloadBytes, payloadOmitted }) {
	if (payloadOmitted) return bytes(payloadBytes);
	const flat = (value) => Object.entries(value ?? {});
	return flat(whole).flatMap((pair) => (typeof pair[1] === "object" ? flat(pair[1]) : [pair]))
		.filter(([name, value]) => /string|number/.test(typeof value) && !/(id|hash|at|name|token|url|replay)$/i.test(name))
		.map(([name, value]) => `${name} ${value}`).join(" · ");
}

// --- state

function stateTab(run) {
	let versions = [];
	const slider = input(null, { type: "range", min: 0, label: "Version", oninput: () => choose(slider.value) });
	const step = (label, by, attributes) => iconButton("chevron", label, () => choose(Number(slider.value) + by), attributes);
	const against = select("Compare with", [], drawDiff);
	const [about, shown, diff] = [el("div"), el("div"), el("div")];
	const built = [card("State", null, el("div.slider", step("Earlier version", -1, { "data-back": "" }), slider,
		step("Later version", 1)), about, shown),
	card("Changes", el("label.row", el("span", "against"), against), diff)];
	const severalStreams = () => new Set(versions.map(({ streamName }) => streamName)).size > 1;
	const wordOf = ({ streamName, version, label }) =>
		[severalStreams() && streamName, version, label].filter(Boolean).join(" ");

	function choose(index) {
		slider.value = index; // the browser keeps it between the first and the last
		const chosen = versions[slider.value];
		slider.setAttribute("aria-valuetext", `version ${wordOf(chosen)}`);
		against.value = Math.max(0, slider.value - 1);
		fill(about, facts({ Version: `${chosen.version} of ${versions.length}`, Stream: severalStreams() && chosen.streamName,
			Label: chosen.label && strong(chosen.label), Reason: chosen.reason, By: chosen.createdBy,
			Time: time(chosen.createdAt, "precise") }));
		drawSoon();
	}

	const drawSoon = debounce(() => {
		fill(shown, payload("Value", run.id, "state", versions[slider.value].id));
		drawDiff();
	}, 40);

	async function drawDiff() {
		const pair = [against, slider].map(({ value }) => versions[value]);
		if (pair[0] === pair[1]) return fill(diff, muted(versions.length > 1 ? "The same version." : "There is only one."));
		fill(diff, diffTable(...await Promise.all(pair.map(({ id }) => readPayload(run.id, "state", id)))));
	}

	return loadedTab(/^(state|snapshot)\./, async (box) => {
		const found = [];
		await readPages(`${run.url}/state/versions`, "stateVersions", { view: "light", limit: 1000 },
			(some) => found.push(...some));
		const following = versions.length === 0 || slider.value === slider.max; // the newest: it moves on with it
		versions = found.sort((one, other) => (one.liveVersion ?? 0) - (other.liveVersion ?? 0)
			|| one.createdAt.localeCompare(other.createdAt));
		if (versions.length === 0) {
			return fill(box, empty("No state", "A workflow that calls ", code("run.state.set({...})"),
				" shows its state here, version by version."));
		}
		if (!box.contains(slider)) fill(box, built);
		slider.max = versions.length - 1;
		fill(against, options(versions.map((version, index) => [index, wordOf(version)])));
		choose(following ? slider.max : slider.value);
	});
}

// --- gates

function gatesTab(run) {
	const element = el("div.stack");
	const update = () => once(element, run.gates.map(({ raw }) => raw), () => fill(element, run.gates.map((gate) =>
		gateCard(gate)), !run.gates.length && empty("No gates", "A decision of a person: ",
		code('run.gate("approve", "Send this?")'), ".")));
	update();
	return { element, update };
}

// --- usage

function usageTab(run) {
	const stepOf = ({ runId, stepName }) => (runId === run.id ? "" : "child: ") + (stepName ?? "outside of steps");
	const table = grid("id", [
		["Time", ({ createdAt }) => time(createdAt, "short")], ["Step", stepOf],
		["Model", ({ provider, model, kind }) => [provider, model].filter(Boolean).join(" ") || kind],
		["Label", ({ label, quantity, unit }) => label ?? (quantity === null ? "" : `${quantity} ${unit ?? ""}`)],
		["In", ({ inputTokens: many }) => many !== null && count(many), "num"],
		["Out", ({ outputTokens: many }) => many !== null && count(many), "num"],
		["Cost", ({ costUsd }) => el("span", { title: costUsd }, money(costUsd)), "num"],
	], empty("No usage", "Recorded by ", code("run.usage.record(model=…, cost_usd=…)"), "."));
	return loadedTab(/^usage\./, async (box) => {
		const { usage, byModel, truncated } = await get(`${run.url}/usage`, { limit: 1000, subtree: "true" });
		const sum = (entries) => entries.reduce((all, { costUsd }) => all + Number(costUsd), 0);
		const dearest = [...Map.groupBy(usage, stepOf)].map(([step, entries]) => [step, sum(entries)])
			.sort((one, other) => other[1] - one[1]).slice(0, 30);
		table.set(usage);
		fill(box, el("p", strong(money(sum(byModel))), ` in ${plural(usage.length, "entry", "entries")}`,
			run.counts.children > 0 && ", with those of its children", truncated && " (the first of more)"),
		usage.length > 0 && [meters("By model", byModel.map((group) => [group.model ?? "no model", Number(group.costUsd)])),
			meters("By step", dearest)], table);
	});
}

// --- children, as a tree

function childrenTab(run) {
	const folded = new Set();
	const table = grid("id", [
		["Child", ({ id, name, depth, open, parent }) => {
			const fold = parent && iconButton("chevron", `Children of ${name}`, () => {
				if (!folded.delete(id)) folded.add(id);
				update();
			}, { "aria-expanded": String(open) });
			return el("div.unfolds", { style: { paddingLeft: `${depth * 1.3 - 0.8}rem` } }, fold, link(runUrl(id), name ?? id));
		}], ["Status", runStatus], ["Workflow", "workflowName"],
		["Why, or how it ended", outcome], ["Created", "createdAt"],
	], empty("No children", "Runs for parts of its work: ", code('run.child("name", "workflow")'), "."));
	const more = muted("The first 1,000 runs of the tree.");
	function update() {
		const below = Map.groupBy(run.tree, ({ parentRunId }) => parentRunId);
		const branch = (id) => (below.get(id) ?? []).flatMap((child) => {
			const open = !folded.has(child.id);
			return [{ ...child, open, parent: below.has(child.id) }, ...open ? branch(child.id) : []];
		});
		table.set(branch(run.id));
		show(more, run.treeTruncated);
	}
	update();
	return { element: el("div.stack", table, more), update };
}

// --- webhooks

function webhooksTab(run, panel) {
	const shownAs = ({ status: is }) => status(is === "pending" ? "waiting" : is, is);
	const nameOf = ({ eventType, reason }) => eventType ?? reason;
	function open(delivery) {
		const { id, kind, attempts, nextAttemptAt, httpStatus, url, payloadBytes, responseBytes } = delivery;
		panel.open(nameOf(delivery), [
			facts({ Status: shownAs(delivery), Kind: kind, Tries: attempts,
				"Next try": delivery.status === "pending" && time(nextAttemptAt), HTTP: httpStatus, Id: idText(id) }),
			el("p", code(url)), errorText(delivery.errorText),
			payloadBytes > 0 && payload("Body", run.id, "delivery", id),
			responseBytes > 0 && payload("Answer", run.id, "delivery.response", id)]);
	}
	async function resend({ id }) {
		await post(`${run.url}/deliveries/${id}/resend`);
		toast("It is sent again.");
		tab.again();
	}
	const table = grid("id", [
		["Status", shownAs], ["Event", (delivery) => button(nameOf(delivery), () => open(delivery), "quiet")],
		["To", "url"], ["Tries", "attempts"],
		["Answer", ({ errorText: refused, httpStatus }) => (refused ? el("span.error-text", refused) : httpStatus)],
		["Created", "createdAt"],
		canWrite() && ["", (delivery) => delivery.status !== "pending"
			&& button("Resend", () => resend(delivery)), "buttons"],
	], empty("No webhooks", "It has no recovery webhook and no channel, or nothing was sent yet."));
	const tab = loadedTab(/^(recovery|run)\./, async (box) => {
		const { deliveries, nextCursor } = await get(`${run.url}/deliveries`, { limit: 200 });
		table.set(deliveries);
		fill(box, table, nextCursor && muted("The newest 200."));
	}, true);
	return tab;
}

// --- one step, for the side panel

const REPLAY = { auto: "runs again", manual: "waits for a review", never: "never runs again" };

/** Read again after events of the step, since they carry no sizes. rowOf() is its row in the waterfall. */
export function stepPanel(run, { key, runId }, rowOf) {
	const own = runId === run.id ? run : run.unfolded.get(runId);
	const panel = loading(async (box) => {
		const step = await own.readStep(key);
		const { sideEffects, replay, idempotencyKey } = step.resumeContract ?? {};
		const shown = (title, of) => step[`${of}Bytes`] > 2 && payload(title, runId, `step.${of}`, key, of === "error");
		fill(box,
			facts({ Status: status(step.status), Attempt: step.attempt, Began: time(step.startedAt, "precise"),
				Took: step.completedAt && between(step.startedAt ?? step.createdAt, step.completedAt),
				Owner: step.leaseOwner && code(step.leaseOwner),
				Copied: step.copied && "from the run that this is a fork of" }),
			step.status === "manual_review" && canWrite() && card("Decide it", null, reviewForm(runId, step, panel.again)),
			shown("Error", "error"), shown("Output", "output"), shown("Input", "input"), attemptsTable(rowOf()),
			el("h3", "Contract"),
			facts({ "Side effects": sideEffects?.length ? sideEffects.map((effect) => tag(String(effect))) : "none declared",
				"On a crash": REPLAY[replay] ?? replay, "Idempotency key": idempotencyKey && idText(idempotencyKey),
				"Input hash": idText(step.inputHash, step.inputHash.slice(0, 12)) }),
			shown("Options", "options"));
	}, 4);
	const again = debounce(panel.again, 150);
	return Object.assign(panel, { update: (events) => events.some(({ stepId }) => stepId === key) && again() });
}

/** The attempts of a step or of the run, when there were several. */
export function attemptsTable(row) {
	const attempts = attemptsOf(row);
	return attempts.length > 1 && plainTable(attempts.map(({ n, kind, owner, from, to }) => [n,
		status(kind === "cut" ? "stalled" : kind, WORDS[kind]), owner ?? dash(), time(from, "precise"),
		number(to === null ? "…" : duration(to - from))]), ["Attempt", "Outcome", "Worker", "Began", "Took"]);
}
