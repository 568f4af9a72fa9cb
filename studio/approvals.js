// Approvals: all that waits for a person, across runs, oldest first; what was decided; and the page of one gate.
//
// openReview is that page: it is opened with the gate's token alone, which stands in the fragment of its address and so in
// no request line, log or Referer; the token is sent in the body.

import { canWrite, getText, path, poll, post, query as toQuery } from "./api.js";
import { gateForm, reviewForm } from "./decide.js";
import { compactCount, count, duration, el, empty, fill, icon, money, setText, show, skeleton, status, syncRows, time, toast, zoneName }
  from "./dom.js";
import { items as itemsOf, member } from "./json.js";
import { inlinePayload } from "./payload.js";
import { runUrl, setQuery, setTitle } from "./router.js";
import { gateBody } from "./tabs.js";

const REFRESH_MS = 3000;

/** An item with the texts of its payloads, so that they can be shown as they are stored. */
function readItem(raw) {
  const item = JSON.parse(raw);
  if (item.gate) item.gate.raw = member(raw, "gate");
  item.stateText = member(raw, "context", "state");
  return item;
}

const idOf = (item) => item.gate?.id ?? item.step.id;
const headline = (item) => item.gate?.prompt || item.gate?.name || `Step ${item.step.name} may have had its effect`;

export async function open({ main, query, signal }) {
  let tab = query.get("tab") === "decided" ? "decided" : "pending";
  let list = [];
  let nextCursor = null;
  let chosen = query.get("item");
  let shownItem = null;

  const number = el("span");
  const tabs = el("nav.tabs", { "aria-label": "Approvals" }, [["pending", "Waiting", number], ["decided", "Decided", null]].map(([name, word, tally]) =>
    el("a", { href: `/studio/approvals${name === "pending" ? "" : "?tab=decided"}`, "data-tab": name }, word, tally)));
  const left = el("div.inbox-list", { role: "list", "aria-label": "What waits" }, skeleton(5));
  const more = el("button", { hidden: true, onclick: () => load(true) }, "More");
  const detail = el("div.stack");
  const layout = el("div.inbox", el("div.stack", left, more), detail);
  fill(main, el("header.spread", el("h1", "Approvals"), el("span.muted", "Times in ", el("span", { "data-zone": "" }, zoneName()))), tabs, layout);

  async function load(further = false) {
    const asked = tab;
    const text = await getText(`/approvals${toQuery({ status: tab, limit: 50, after: further ? nextCursor : null })}`, { signal });
    if (asked !== tab) return;
    const answer = JSON.parse(text);
    const items = [...itemsOf(member(text, "items"))].map(readItem);
    list = further ? [...list, ...items] : keepFurther(items);
    if (further || list.length <= 50) ({ nextCursor } = answer);
    setText(number, answer.count ? `${count(answer.count)}${answer.more ? "+" : ""}` : "");
    draw();
  }

  /** A refresh reads the first page: what was read further on demand stays. */
  const keepFurther = (items) => (list.length > 50 ? [...items, ...list.slice(50)] : items);

  function draw() {
    for (const link of tabs.children) link.setAttribute("aria-selected", String(link.dataset.tab === tab));
    show(more, Boolean(nextCursor));
    show(layout, list.length > 0);
    if (list.length === 0) {
      shownItem = null;
      nothing.hidden = false;
      return fill(nothing, tab === "pending" ? empty("Nothing waits for a person", "Gates of all runs stand here while they are pending, and steps of which nobody knows whether they had their effect.")
        : empty("Nothing has been decided yet"));
    }
    nothing.hidden = true;
    if (left.querySelector(".skeleton")) fill(left);
    syncRows(left, list, idOf, makeAsk, (node, item) => node.firstChild.setAttribute("aria-current", String(idOf(item) === chosen)));
    const item = list.find((one) => idOf(one) === chosen);
    if (item) showItem(item);
    else if (!shownItem && matchMedia("(min-width: 72.01rem)").matches) choose(idOf(list[0]));
    else if (shownItem && !list.includes(item)) markGone();
  }

  const nothing = el("div.card", { hidden: true });
  main.append(nothing);

  function makeAsk(item) {
    return el("div", { role: "listitem" }, el("button", { class: "ask", onclick: () => choose(idOf(item)) },
      el("strong", headline(item)),
      el("span.row.muted", el("span", item.run.workflowName), "·",
        tab === "pending" ? el("span", "since ", time(item.since, "since")) : el("span", time(item.gate?.resolvedAt ?? item.since, "short")),
        item.kind === "review" ? el("span.tag", "step review") : tab === "decided" && status(item.gate.status),
        tab === "decided" && item.gate?.actor && `by ${item.gate.actor}`)));
  }

  function choose(id) {
    chosen = id;
    shownItem = null;
    setQuery({ item: id });
    draw();
    if (matchMedia("(max-width: 72rem)").matches) detail.scrollIntoView({ block: "start" });
  }

  /** Somebody else decided what is open here: say so, and leave what was typed. */
  function markGone() {
    if (detail.querySelector(".fault")) return;
    detail.prepend(el("p.fault", { role: "status" }, "This has been decided meanwhile, or its run has ended."));
  }

  function showItem(item) {
    if (shownItem === idOf(item)) return; // what somebody is typing there stays
    shownItem = idOf(item);
    const { run, gate, step, context } = item;
    const done = () => {
      toast("Decided.");
      list = list.filter((one) => one !== item);
      shownItem = chosen = null;
      setQuery({ item: null });
      fill(detail);
      draw();
      load();
    };
    fill(detail,
      el("article.card",
        el("header", el("h2", gate?.name ?? `Step ${step.name}`),
          el("div.row", status(gate && gate.status !== "pending" ? gate.status : gate ? "waiting" : "review"), time(item.since, "short"))),
        el("div.body.stack",
          gate ? gateBody(gate) : [el("p.prompt", headline(item)),
            step.error && el("p.error-text", [step.error.name, step.error.message].filter(Boolean).join(": ")),
            el("p.muted", "Side effects: ", (step.resumeContract?.sideEffects ?? []).join(", ") || "none declared", `, attempt ${step.attempt}`)],
          tab === "pending" && canWrite() && (gate ? gate.resolveToken && gateForm(gate, done) : reviewForm(run.id, step, done)))),
      el("section.card",
        el("header", el("h2", "The run so far"), el("a.link", { href: runUrl(run.id) }, `${run.workflowName} `, el("code", run.id))),
        el("div.body.stack",
          el("dl.facts", [["Status", status(run.status)], ["Steps completed", el("span", count(context.stepsCompleted))],
            ["Cost", el("span", money(context.costUsd ?? 0))], context.totalTokens && ["Tokens", el("span", compactCount(context.totalTokens))], ["Created", time(run.createdAt)]]
            .filter(Boolean).map(([word, node]) => el("div", el("dt", word), el("dd", node)))),
          context.steps.length > 0 && el("table", el("tbody", context.steps.map((one) => el("tr", el("td", status(one.status)), el("td", one.name),
            el("td.num.muted", one.completedAt && one.startedAt ? duration(new Date(one.completedAt) - new Date(one.startedAt)) : ""))))),
          item.stateText && item.stateText !== "null" && inlinePayload(`State, version ${context.stateVersion}`, item.stateText, `${run.id}-state`),
          context.stateOmitted && el("p.muted", "Its state is long: ", el("a.link", { href: runUrl(run.id, "?tab=state") }, "open it"), "."))));
  }

  async function onQuery(parameters) {
    tab = parameters.get("tab") === "decided" ? "decided" : "pending";
    chosen = parameters.get("item");
    list = [];
    shownItem = null;
    fill(detail);
    fill(left, skeleton(5));
    show(layout, true);
    show(nothing, false);
    await load();
  }

  setTitle("Approvals");
  await load();
  poll(() => load(), REFRESH_MS, signal)();
  return {
    onQuery,
    keys(key) {
      const index = list.findIndex((one) => idOf(one) === chosen);
      if (key === "j" || key === "k") {
        const next = list[Math.max(0, Math.min(list.length - 1, index + (key === "j" ? 1 : -1)))];
        if (next) choose(idOf(next));
        left.children[list.indexOf(next)]?.firstChild.focus();
        return true;
      }
      if (key === "Enter" && list[index]) {
        detail.querySelector("input")?.focus();
        return true;
      }
      return false;
    },
  };
}

// --- the page of one gate, by its token

export async function openReview(body) {
  setTitle("Review");
  const box = el("main.review-page");
  fill(body, box);
  const [runId, gateId, token] = location.hash.slice(1).split("/").map(decodeURIComponent);
  const brand = el("div.row", el("img", { src: "/studio/icon.svg", alt: "", width: 28, height: 28 }), el("strong", "Tidebase"));
  if (!token) return fill(box, brand, empty("This link is not whole", "It must hold a run, a gate and a token after the #. Open it as it was sent to you."));
  fill(box, brand, skeleton(4));

  async function load() {
    let text;
    try {
      text = await post(path`/runs/${runId}/gates/${gateId}/look`, { token }, { key: null, asText: true });
    } catch (error) {
      const gone = error.status >= 400 && error.status < 500;
      return fill(box, brand, gone ? empty("This link opens nothing", "It is not whole, or what it was for is gone.")
        : el("div.fault", { role: "alert" }, error.message, el("button", { onclick: load }, "Try again")));
    }
    const raw = member(text, "gate");
    showGate({ ...JSON.parse(raw), raw, runId, resolveToken: token, reviewUrl: null });
  }

  function showGate(gate) {
    const expired = gate.status === "canceled";
    const open = gate.status === "pending" && !["completed", "failed", "cancelled"].includes(gate.runStatus);
    setTitle(gate.name);
    const words = { approved: "Approved", rejected: "Rejected", canceled: gate.actor === "timeout" ? "Expired" : "Withdrawn" };
    fill(box, brand,
      !open && el("div.card", el("div.body.row", { role: "status" },
        status(gate.status === "pending" ? "cancelled" : gate.status, words[gate.status] ?? "Its run has ended"),
        !expired && gate.actor && `by ${gate.actor}`, gate.resolvedAt && time(gate.resolvedAt, "short"))),
      el("p.row.muted", icon("approvals"), gate.workflowName, "·", gate.name, "·", "asked ", time(gate.createdAt)),
      el("div.stack", gateBody(gate)),
      open && gateForm(gate, () => { toast("Thank you: it is recorded."); load(); }, { key: null }),
      el("p.muted", "Times in ", el("span", { "data-zone": "" }, zoneName())));
  }
  await load();
}
