// What a person decides: a gate, or a step of which nobody knows whether it had its effect. The forms for it; the page
// of all that waits, oldest first, and of what was decided; and the page of one gate.

import { canWrite, every, getText, path, post, postText, runUrl, setQuery, setTitle } from "./api.js";
import { between, button, card, code, compactCount, copyButton, count, el, empty, errorText, facts, field, fields, fill,
	heading, input, link, loading, logo, money, muted, number, once, plainTable, row, setState, setText, show, status,
	strong, syncRows, tag, time, toast, zoneButton } from "./dom.js";
import { bodyOf, inlinePayload, items, jsonInput, member, payload } from "./payload.js";
import { errorLine } from "./runs.js";

const ACTOR = "tidebase.actor";

export const actor = () => localStorage.getItem(ACTOR) ?? "";

/** Its buttons [value, word, class] send a decision with the form's values. Enter in a field decides nothing. */
function decisionForm(entries, buttons, send, onDone) {
	const fault = errorText();
	const form = el("form.stack", {
		onkeydown: (event) => event.key === "Enter" && event.target.matches("input") && event.preventDefault(),
		async onsubmit(event) {
			event.preventDefault();
			const values = Object.fromEntries(new FormData(form));
			localStorage.setItem(ACTOR, values.actor);
			form.inert = true;
			try {
				await send(event.submitter.value, values);
				document.dispatchEvent(new CustomEvent("decided"));
				onDone?.();
			} catch (error) {
				setText(fault, error.message);
				form.inert = false;
			}
		},
	}, fields(field("Your name", input("actor", { autocomplete: "name", maxlength: 200, value: actor() })), entries), fault,
	el("div.decide", buttons.map(([value, word, kind]) => el(`button${kind}`, { value }, word))));
	return form;
}

const gateForm = (gate, onDone, options = {}) => decisionForm(
	[field("Note", input("note", { maxlength: 2000 }), "goes with the decision as payload.note"),
		el("details.all", el("summary", "Answer with JSON"),
			field("Payload", jsonInput("payload"), "what the run gets as the decision's payload, instead of the note"))],
	[["approved", "Approve", ".primary"], ["rejected", "Reject", ".danger"]],
	(decision, { actor: name, note, payload: typed }) => post(path`/runs/${gate.runId}/gates/${gate.id}/resolve`,
		bodyOf({ token: gate.resolveToken, decision, actor: name },
			{ payload: typed || (note && JSON.stringify({ note })) }), options), onDone);

export const reviewForm = (runId, step, onDone) => decisionForm(
	[field("Output, when it happened", jsonInput("output", { rows: 2, placeholder: "null" }),
		"JSON: what the step would have returned"),
	el("p.all", "It was begun and did not complete. Look where its effect would show (the mail, the charge, the row), then"
		+ " say what happened.")],
	[["retry", "It did not happen: run it again", ""], ["complete", "It happened: keep this output", ".primary"],
		["fail", "Fail the step", ".danger"]],
	(decision, { actor: name, output }) => post(path`/runs/${runId}/steps/${step.id}/review`,
		bodyOf({ decision, actor: name }, decision === "complete" ? { output: output.trim() || "null" } : {})), onDone);

const gateStatus = (gate) => status(gate.status === "pending" ? "waiting" : gate.status);

/** `raw` is the gate's text. */
function gateBody({ raw, id, runId, prompt, capability, channels = [], expiresAt, dataOmitted, reviewUrl }) {
	const shown = (title, name) => {
		const text = member(raw, name);
		return text && text !== "null" && text !== "{}" && inlinePayload(title, text, `${id}-${name}`, true);
	};
	return [el("p.prompt", prompt),
		facts({ Capability: capability && code(member(raw, "capability").replace(/^"|"$/g, "")),
			Asked: channels.map(({ url }) => new URL(url).host).join(", "), Expires: time(expiresAt) }),
		dataOmitted ? payload("Data", runId, "gate.data", id) : shown("Data", "data"), shown("Answer", "decisionPayload"),
		reviewUrl && canWrite() && el("p.row", copyButton(reviewUrl, "Copy the review link", "Copy review link"),
			muted("Whoever has it may decide this gate, without a key."))];
}

export const gateCard = (gate, onDone) => card(gate.name,
	row(gateStatus(gate), gate.actor && `by ${gate.actor}`, time(gate.resolvedAt ?? gate.createdAt, "short")),
	gateBody(gate), gate.status === "pending" && canWrite() && gate.resolveToken && gateForm(gate, onDone));

// --- the inbox

const PAGE_SIZE = 50;
const idOf = (item) => (item.gate ?? item.step).id;
const headline = ({ gate, step }) => gate?.prompt || gate?.name || `Step ${step.name} may have had its effect`;
const wide = () => matchMedia("(min-width: 72.01rem)").matches; // the list and what is chosen stand side by side

function readItem(raw) {
	const item = JSON.parse(raw);
	if (item.gate) item.gate.raw = member(raw, "gate");
	return { ...item, stateText: member(raw, "context", "state") };
}

export async function approvalsPage({ main, query, signal }) {
	let tab = null;
	let list = [];
	let nextCursor = null;
	let chosen = null; // its form is built once: what somebody types there stays

	const tally = el("span");
	const waiting = el("a", { href: "/studio/approvals" }, "Waiting", tally);
	const decided = el("a", { href: "/studio/approvals?tab=decided" }, "Decided");
	const left = el("div.stack", { role: "list", label: "What waits" });
	const more = button("More", () => load(true));
	const [detail, nothing] = [el("div.stack"), el("div")];
	const inbox = el("div.inbox", el("div.stack", left, more), detail);

	async function load(further = false) {
		const asked = tab;
		const text = await getText("/approvals", { status: tab, limit: PAGE_SIZE, after: further ? nextCursor : null });
		if (asked !== tab) return;
		const answer = JSON.parse(text);
		const found = items(member(text, "items")).map(readItem);
		if (further || list.length <= PAGE_SIZE) ({ nextCursor } = answer);
		list = further ? [...list, ...found] : [...found, ...list.slice(PAGE_SIZE)]; // a refresh reads the first page
		setText(tally, answer.count ? count(answer.count, answer.more) : "");
		draw();
	}

	function draw() {
		show(more, nextCursor);
		show(inbox, list.length > 0);
		fill(nothing, list.length === 0 && el("div.card", tab === "decided" ? empty("Nothing has been decided yet")
			: empty("Nothing waits for a person", "Here stand gates that are pending, and steps of which nobody knows whether"
				+ " they had their effect.")));
		syncRows(left, list, idOf, makeAsk, (node, item) => setState(node.firstChild, "current", idOf(item) === chosen));
		const item = list.find((one) => idOf(one) === chosen);
		if (item) once(detail, chosen, () => showItem(item));
		else if (detail.firstChild && !detail.firstChild.matches(".why")) {
			detail.prepend(el("p.why.is-failed", { role: "status" }, "Decided meanwhile, or its run has ended."));
		} else if (!detail.firstChild && list[0] && wide()) choose(list[0]);
	}

	function makeAsk(item) {
		const { run, gate, since } = item;
		const words = tab === "pending" ? [el("span", "since ", time(since, "since")), !gate && tag("step review")]
			: [time(gate.resolvedAt, "short"), gateStatus(gate), gate.actor && `by ${gate.actor}`];
		return el("div", { role: "listitem" }, button(
			[strong(headline(item)), el("span.row.muted", el("span", run.workflowName), "·", words)], () => {
				choose(item);
				if (!wide()) detail.scrollIntoView();
			}, "ask", { "data-row": "" }));
	}

	function choose(item) {
		chosen = item && idOf(item);
		setQuery({ item: chosen });
		if (!item) once(detail, null, () => fill(detail));
		draw();
	}

	function showItem(item) {
		const done = () => {
			toast("Decided.");
			list = list.filter((one) => one !== item);
			choose(null);
			load();
		};
		fill(detail, item.gate ? gateCard(item.gate, done) : stepCard(item, done), runCard(item));
	}

	async function onQuery(parameters) {
		tab = parameters.get("tab") === "decided" ? "decided" : "pending";
		setState(waiting, "current", tab === "pending");
		setState(decided, "current", tab === "decided");
		list = [];
		chosen = parameters.get("item");
		fill(left);
		once(detail, null, () => fill(detail));
		await load();
	}

	await onQuery(query);
	fill(main, heading("Approvals"), el("nav.tabs", { label: "Approvals" }, waiting, decided), nothing, inbox);
	every(load, 3000, signal);
	return { onQuery };
}

function stepCard(item, done) {
	const { run, step, since } = item;
	return card(step.name, row(status("manual_review"), time(since, "short")),
		el("p.prompt", headline(item)), errorText(errorLine(step.error)),
		facts({ "Side effects": step.resumeContract?.sideEffects?.join(", ") || "none declared", Attempt: step.attempt }),
		canWrite() && reviewForm(run.id, step, done));
}

function runCard({ run, context, stateText }) {
	return card("The run so far", link(runUrl(run.id), run.workflowName),
		facts({ Status: status(run.status), "Steps completed": count(context.stepsCompleted),
			Cost: money(context.costUsd), Tokens: context.totalTokens && compactCount(context.totalTokens),
			Created: time(run.createdAt) }),
		context.steps.length > 0 && plainTable(context.steps.map(({ status: is, name, startedAt, completedAt }) =>
			[status(is), name, number(completedAt && between(startedAt ?? completedAt, completedAt))])),
		(stateText ?? "null") !== "null" &&
			inlinePayload(`State, version ${context.stateVersion}`, stateText, `${run.id}-state`),
		context.stateOmitted && muted("Its state is long: ", link(runUrl(run.id, { tab: "state" }), "open it"), "."));
}

// --- the page of one gate: its token stands in the fragment of the address, and so in no log and no Referer

const DECIDED = { approved: "Approved", rejected: "Rejected", canceled: "Withdrawn" };

export function reviewPage(body) {
	const [runId, gateId, token] = location.hash.slice(1).split("/").map(decodeURIComponent);
	const shown = loading(async (box) => {
		let raw;
		try {
			raw = member(await postText(path`/runs/${runId}/gates/${gateId}/look`, { token }, { key: null }), "gate");
		} catch (error) {
			if (error.status >= 500 || error.status === 0) throw error;
			return fill(box, empty("This link opens nothing",
				"It is not whole, or what it was for is gone. Open it as it was sent."));
		}
		const gate = { ...JSON.parse(raw), raw, runId, resolveToken: token, reviewUrl: null };
		const { actor, resolvedAt, runStatus, workflowName, name, createdAt } = gate;
		const pending = gate.status === "pending";
		const open = pending && !/completed|failed|cancelled/.test(runStatus);
		const word = actor === "timeout" ? "Expired" : DECIDED[gate.status] ?? "Its run has ended";
		setTitle(name);
		fill(box,
			!open && el("div.card", el("div.body.row", { role: "status" }, status(pending ? "cancelled" : gate.status, word),
				actor && actor !== "timeout" && `by ${actor}`, time(resolvedAt, "short"))),
			el("p.row.muted", [workflowName, "·", name, "·", ["asked ", time(createdAt)]].map((part) => el("span", part))),
			gateBody(gate),
			open && gateForm(gate, () => {
				toast("Thank you: it is recorded.");
				shown.again();
			}, { key: null }));
	});
	setTitle("Review");
	fill(body, el("main.page.review", row(logo(28), el("h1", "Tidebase")), shown, zoneButton()));
}
