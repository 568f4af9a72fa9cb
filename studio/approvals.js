// Approvals: all that waits for a person, across runs, oldest first; what was decided; and the page of one gate.
//
// openReview is that page: it is opened with the gate's token alone, which stands in the fragment of its address and so
// in no request line, log or Referer; the token is sent in the body.

import { canWrite, every, getText, path, postText } from "./api.js";
import { gateForm, reviewForm } from "./decide.js";
import { between, button, card, compactCount, count, el, empty, errorText, facts, fill, heading, link, loading, money,
	muted, number, plainTable, setText, show, skeleton, status, strong, syncRows, tag, time, toast, zoneNote } from
	"./dom.js";
import { items, member } from "./json.js";
import { inlinePayload } from "./payload.js";
import { runUrl, setQuery, setTitle } from "./router.js";
import { gateBody } from "./tabs.js";
import { errorLine } from "./runs.js";

const PAGE_SIZE = 50;
const idOf = (item) => (item.gate ?? item.step).id;
const headline = ({ gate, step }) => gate?.prompt || gate?.name || `Step ${step.name} may have had its effect`;
const gateStatus = (gate) => status(gate.status === "pending" ? "waiting" : gate.status);
const wide = () => matchMedia("(min-width: 72.01rem)").matches; // the list and what is chosen stand side by side

/** An item with the texts of its payloads, which are shown as they are stored. */
function readItem(raw) {
	const item = JSON.parse(raw);
	if (item.gate) item.gate.raw = member(raw, "gate");
	return { ...item, stateText: member(raw, "context", "state") };
}

export async function open({ main, query, signal }) {
	let tab = null;
	let list = [];
	let nextCursor = null;
	let chosen = null;
	let shown = null; // the item whose form is built: what somebody types there stays

	const tally = el("span");
	const tabs = el("nav.tabs", { "aria-label": "Approvals" },
		el("a", { href: "/studio/approvals" }, "Waiting", tally),
		el("a", { href: "/studio/approvals?tab=decided" }, "Decided"));
	const left = el("div.stack", { role: "list", "aria-label": "What waits" });
	const more = button("More", () => load(true));
	const [detail, nothing] = [el("div.stack"), el("div")];
	const inbox = el("div.inbox", el("div.stack", left, more), detail);
	fill(main, heading("Approvals", zoneNote()), tabs, nothing, inbox);

	async function load(further = false) {
		const asked = tab;
		const text = await getText("/approvals", { status: tab, limit: PAGE_SIZE, after: further ? nextCursor : null });
		if (asked !== tab) return;
		const answer = JSON.parse(text);
		const found = items(member(text, "items")).map(readItem);
		if (further || list.length <= PAGE_SIZE) ({ nextCursor } = answer);
		list = further ? [...list, ...found] : [...found, ...list.slice(PAGE_SIZE)]; // a refresh reads the first page
		setText(tally, answer.count ? `${count(answer.count)}${answer.more ? "+" : ""}` : "");
		draw();
	}

	function draw() {
		show(more, nextCursor);
		show(inbox, list.length > 0);
		fill(nothing, list.length === 0 && el("div.card", tab === "decided" ? empty("Nothing has been decided yet")
			: empty("Nothing waits for a person", "Gates of all runs stand here while they are pending, and steps of which"
				+ " nobody knows whether they had their effect.")));
		syncRows(left, list, idOf, makeAsk,
			(node, item) => node.firstChild.setAttribute("aria-current", String(idOf(item) === chosen)));
		const item = list.find((one) => idOf(one) === chosen);
		if (item) showItem(item);
		else if (!shown && list[0] && wide()) choose(list[0]);
		else if (shown && !detail.querySelector(".fault")) {
			detail.prepend(el("p.fault", { role: "status" }, "This has been decided meanwhile, or its run has ended."));
		}
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
		shown = null;
		setQuery({ item: chosen });
		if (!item) fill(detail);
		draw();
	}

	function showItem(item) {
		if (shown === idOf(item)) return;
		shown = idOf(item);
		const { run, gate, step, context, stateText } = item;
		const done = () => {
			toast("Decided.");
			list = list.filter((one) => one !== item);
			choose(null);
			load();
		};
		const effects = step?.resumeContract?.sideEffects?.join(", ") || "none declared";
		const deciding = tab === "pending" && canWrite();
		fill(detail,
			card((gate ?? step).name,
				el("div.row", gate ? gateStatus(gate) : status("manual_review"), time(item.since, "short")),
				gate ? gateBody(gate) : [el("p.prompt", headline(item)), errorText(errorLine(step.error)),
					facts([["Side effects", effects], ["Attempt", step.attempt]])],
				deciding && (!gate ? reviewForm(run.id, step, done) : gate.resolveToken && gateForm(gate, done))),
			card("The run so far", link(runUrl(run.id), run.workflowName),
				facts([["Status", status(run.status)], ["Steps completed", count(context.stepsCompleted)],
					["Cost", money(context.costUsd)], context.totalTokens && ["Tokens", compactCount(context.totalTokens)],
					["Created", time(run.createdAt)]]),
				context.steps.length > 0 && plainTable(context.steps.map(({ status: is, name, startedAt, completedAt }) =>
					[status(is), name, number(completedAt && between(startedAt ?? completedAt, completedAt))])),
				(stateText ?? "null") !== "null" &&
					inlinePayload(`State, version ${context.stateVersion}`, stateText, `${run.id}-state`),
				context.stateOmitted &&
					muted("Its state is long: ", link(runUrl(run.id, { tab: "state" }), "open it"), ".")));
	}

	async function onQuery(parameters) {
		tab = parameters.get("tab") === "decided" ? "decided" : "pending";
		[...tabs.children].forEach((anchor, index) =>
			anchor.setAttribute("aria-current", String((tab === "decided") === (index === 1))));
		list = [];
		chosen = parameters.get("item");
		shown = null;
		fill(left);
		fill(detail, skeleton(5));
		await load();
		if (!shown) fill(detail);
	}

	await onQuery(query);
	every(load, 3000, signal);
	return { onQuery };
}

// --- the page of one gate, by its token

const DECIDED = { approved: "Approved", rejected: "Rejected", canceled: "Withdrawn" };
const ENDED = ["completed", "failed", "cancelled"];

export function openReview(body) {
	const [runId, gateId, token] = location.hash.slice(1).split("/").map(decodeURIComponent);
	const look = async (box) => {
		const text = await postText(path`/runs/${runId}/gates/${gateId}/look`, { token }, { key: null }).catch((error) => {
			if (error.status >= 500 || error.status === 0) throw error;
			return null;
		});
		if (text) return showGate(box, member(text, "gate"));
		fill(box, empty("This link opens nothing", "It is not whole, or what it was for is gone. Open it as it was sent."));
	};
	const shown = loading(look, 4);
	setTitle("Review");
	fill(body, el("main.review-page",
		el("div.row", el("img", { src: "/studio/icon.svg", alt: "", width: 28 }), el("h1", "Tidebase")), shown, zoneNote()));

	function showGate(box, raw) {
		const gate = { ...JSON.parse(raw), raw, runId, resolveToken: token, reviewUrl: null };
		const { actor, resolvedAt, runStatus, workflowName, name, createdAt } = gate;
		const pending = gate.status === "pending";
		const open = pending && !ENDED.includes(runStatus);
		const word = actor === "timeout" ? "Expired" : DECIDED[gate.status] ?? "Its run has ended";
		setTitle(name);
		fill(box,
			!open && el("div.card", el("div.body.row", { role: "status" }, status(pending ? "cancelled" : gate.status, word),
				actor && actor !== "timeout" && `by ${actor}`, time(resolvedAt, "short"))),
			muted(workflowName, " · ", name, " · asked ", time(createdAt)), gateBody(gate),
			open && gateForm(gate, () => {
				toast("Thank you: it is recorded.");
				shown.again();
			}, { key: null }));
	}
}
