// Approvals: all that waits for a person, across runs, oldest first; what was decided; and the page of one gate.
//
// openReview is that page: it is opened with the gate's token alone, which stands in the fragment of its address and so in
// no request line, log or Referer; the token is sent in the body.

import { canWrite, every, getText, path, postText } from "./api.js";
import { gateForm, reviewForm } from "./decide.js";
import { button, card, compactCount, count, duration, el, empty, facts, fill, link, money, plainTable, setText, show, skeleton, status, strong, syncRows, time, toast, zoneNote } from "./dom.js";
import { items, member } from "./json.js";
import { inlinePayload } from "./payload.js";
import { runUrl, setQuery, setTitle } from "./router.js";
import { gateBody } from "./tabs.js";
import { errorLine } from "./why.js";

const PAGE_SIZE = 50;
const idOf = (item) => (item.gate ?? item.step).id;
const headline = (item) => item.gate?.prompt || item.gate?.name || `Step ${item.step.name} may have had its effect`;

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

	const number = el("span");
	const tabs = el("nav.tabs", { "aria-label": "Approvals" }, el("a", { href: "/studio/approvals" }, "Waiting", number), el("a", { href: "/studio/approvals?tab=decided" }, "Decided"));
	const left = el("div.stack", { role: "list", "aria-label": "What waits" });
	const more = button("More", () => load(true));
	const detail = el("div.stack");
	const nothing = el("div");
	const layout = el("div.inbox", el("div.stack", left, more), detail);
	fill(main, el("header.spread", el("h1", "Approvals"), zoneNote()), tabs, nothing, layout);

	async function load(further = false) {
		const asked = tab;
		const text = await getText("/approvals", { status: tab, limit: PAGE_SIZE, after: further ? nextCursor : null });
		if (asked !== tab) return;
		const answer = JSON.parse(text);
		const found = [...items(member(text, "items"))].map(readItem);
		if (further || list.length <= PAGE_SIZE) ({ nextCursor } = answer);
		list = further ? [...list, ...found] : [...found, ...list.slice(PAGE_SIZE)]; // a refresh reads the first page
		setText(number, answer.count ? `${count(answer.count)}${answer.more ? "+" : ""}` : "");
		draw();
	}

	function draw() {
		show(more, Boolean(nextCursor));
		show(layout, list.length > 0);
		fill(nothing, list.length === 0 && el("div.card", tab === "decided" ? empty("Nothing has been decided yet")
			: empty("Nothing waits for a person", "Gates of all runs stand here while they are pending, and steps of which nobody knows whether they had their effect.")));
		syncRows(left, list, idOf, makeAsk, (node, item) => node.firstChild.setAttribute("aria-current", String(idOf(item) === chosen)));
		const item = list.find((one) => idOf(one) === chosen);
		if (item) showItem(item);
		else if (!shown && list[0] && matchMedia("(min-width: 72.01rem)").matches) choose(list[0]);
		else if (shown && !detail.querySelector(".fault")) detail.prepend(el("p.fault", { role: "status" }, "This has been decided meanwhile, or its run has ended."));
	}

	function makeAsk(item) {
		return el("div", { role: "listitem" }, button([strong(headline(item)), el("span.row.muted", el("span", item.run.workflowName), "·",
			tab === "pending" ? el("span", "since ", time(item.since, "since")) : time(item.gate?.resolvedAt ?? item.since, "short"),
			item.gate ? tab === "decided" && status(item.gate.status) : el("span.tag", "step review"), tab === "decided" && item.gate?.actor && `by ${item.gate.actor}`)], () => {
			choose(item);
			if (matchMedia("(max-width: 72rem)").matches) detail.scrollIntoView();
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
		const { run, gate, step, context } = item;
		const done = () => {
			toast("Decided.");
			list = list.filter((one) => one !== item);
			choose(null);
			load();
		};
		const body = gate ? gateBody(gate) : [el("p.prompt", headline(item)), el("p.error-text", errorLine(step.error)), facts([["Side effects", step.resumeContract?.sideEffects?.join(", ") || "none declared"], ["Attempt", step.attempt]])];
		fill(detail,
			card(gate?.name ?? step.name, el("div.row", status(!gate ? "manual_review" : gate.status === "pending" ? "waiting" : gate.status), time(item.since, "short")),
				body, tab === "pending" && canWrite() && (!gate ? reviewForm(run.id, step, done) : gate.resolveToken && gateForm(gate, done))),
			card("The run so far", link(runUrl(run.id), run.workflowName),
				facts([["Status", status(run.status)], ["Steps completed", count(context.stepsCompleted)], ["Cost", money(context.costUsd)], context.totalTokens && ["Tokens", compactCount(context.totalTokens)], ["Created", time(run.createdAt)]]),
				context.steps.length > 0 && plainTable(context.steps.map((one) => [status(one.status), one.name,
					el("td.num.muted", one.completedAt && duration(new Date(one.completedAt) - new Date(one.startedAt ?? one.completedAt)))])),
				item.stateText && item.stateText !== "null" && inlinePayload(`State, version ${context.stateVersion}`, item.stateText, `${run.id}-state`),
				context.stateOmitted && el("p.muted", "Its state is long: ", link(runUrl(run.id, "?tab=state"), "open it"), ".")));
	}

	async function onQuery(parameters) {
		tab = parameters.get("tab") === "decided" ? "decided" : "pending";
		[...tabs.children].forEach((link, index) => link.setAttribute("aria-current", String((tab === "decided") === (index === 1))));
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

export async function openReview(body) {
	const [runId, gateId, token] = location.hash.slice(1).split("/").map(decodeURIComponent);
	const box = el("div.stack", skeleton(4));
	setTitle("Review");
	fill(body, el("main.review-page", el("div.row", el("img", { src: "/studio/icon.svg", alt: "", width: 28, height: 28 }), el("h1", "Tidebase")), box, zoneNote()));
	if (!token) return fill(box, empty("This link is not whole", "It must hold a run, a gate and a token after the #. Open it as it was sent to you."));

	async function load() {
		try {
			const raw = member(await postText(path`/runs/${runId}/gates/${gateId}/look`, { token }, { key: null }), "gate");
			showGate({ ...JSON.parse(raw), raw, runId, resolveToken: token });
		} catch (error) {
			fill(box, error.status >= 400 && error.status < 500 ? empty("This link opens nothing", "It is not whole, or what it was for is gone.") : el("div.fault", { role: "alert" }, error.message, button("Try again", load)));
		}
	}

	function showGate(gate) {
		const open = gate.status === "pending" && !["completed", "failed", "cancelled"].includes(gate.runStatus);
		const word = gate.actor === "timeout" ? "Expired" : DECIDED[gate.status] ?? "Its run has ended";
		setTitle(gate.name);
		fill(box,
			!open && el("div.card", el("div.body.row", { role: "status" }, status(gate.status === "pending" ? "cancelled" : gate.status, word), gate.actor !== "timeout" && gate.actor && `by ${gate.actor}`, time(gate.resolvedAt, "short"))),
			el("p.muted", gate.workflowName, " · ", gate.name, " · asked ", time(gate.createdAt)), gateBody({ ...gate, reviewUrl: null }),
			open && gateForm(gate, () => { toast("Thank you: it is recorded."); load(); }, { key: null }));
	}
	await load();
}
