// A run: what it is, why it waits, whether a rerun is safe, and what happened, live.
//
// The page reads a summary and the steps once, follows the run's event stream by seq, and applies each event to the
// timeline. Rows are read again only for what an event does not carry. What is open, selected and scrolled stays.

import { ApiError, canWrite, follow, get, path, poll, post, query as toQuery, session } from "./api.js";
import { compactCount, count, debounce, dialog, duration, el, field, fill, icon, idText, money, plural, setText, show, status, time, toast }
  from "./dom.js";
import { bodyOf, jsonInput, reviewForm } from "./decide.js";
import { payload, readPayload } from "./payload.js";
import { navigate, runUrl, setQuery, setTitle } from "./router.js";
import { StepPanel, TABS } from "./tabs.js";
import { Timeline, Waterfall } from "./waterfall.js";
import { outcome, shownStatus, whyNodes } from "./why.js";

const MOST_EVENTS = 20_000; // of a longer run, the last so many are read at once
const LIVE = new Set(["pending", "queued", "running", "waiting"]);

export async function open({ main, parts: [id], query, signal }) {
  let summary = await get(path`/runs/${id}/summary`, { signal });
  const timeline = new Timeline(session.leaseMs ?? 60_000);
  timeline.setRun(summary.run);
  const run = () => summary.run;

  /** What the tabs share. */
  const model = {
    id, signal, timeline, events: [], steps: new Map(),
    get summary() { return summary; },
    listeners: new Set(),
    refreshSummary: () => readSummary(),
    openPanel,
    closePanel,
  };

  // --- building

  const mark = el("span.mark", { role: "status" }, "loading");
  const badge = el("span");
  const why = el("p.why", { hidden: true });
  const facts = el("dl.facts");
  const verdict = el("section.card.verdict", { "aria-label": "Safe to rerun?", hidden: true });
  const actions = el("div.row");
  const tabs = el("nav.tabs", { role: "tablist", "aria-label": "What is known of this run" });
  const panel = el("aside.card.side", { "aria-label": "Details" });
  const content = el("div.stack", { role: "tabpanel", tabindex: "-1" });
  const split = el("div.split", content, panel);

  fill(main,
    el("nav.crumbs", { "aria-label": "Where" }, el("a", { href: "/studio/runs" }, "Runs"), "/",
      el("a", { href: `/studio/runs${toQuery({ workflow: run().workflowName })}` }, run().workflowName),
      summary.parent && ["/ child of ", el("a.link", { href: runUrl(summary.parent.id) }, summary.parent.name ?? summary.parent.id)],
      run().forkedFrom && ["/ fork of ", el("a.link", { href: runUrl(run().forkedFrom) }, run().forkedFrom),
        el("a.link", { href: `/studio/compare${toQuery({ a: run().forkedFrom, b: id })}` }, "compare")],
      el("span.grow"), mark),
    el("header.run-head",
      el("div.spread", el("h1", run().workflowName, badge), actions),
      idText(id), why, facts),
    verdict, tabs, split);

  // --- header

  function showHeader() {
    const shown = shownStatus(run());
    if (badge.dataset.shown !== shown) {
      badge.dataset.shown = shown;
      fill(badge, status(shown));
      readVerdict();
    }
    setTitle(`${run().workflowName} ${shown}`);
    const line = whyNodes(run()) ?? (run().status === "completed" ? null : outcome(run()));
    show(why, Boolean(line));
    if (line) {
      why.className = `why why-${shown}`;
      // Relative times keep themselves up to date: the line is built again only when it says something else.
      const said = JSON.stringify(run().whyDetail ?? [run().error, run().cancelReason]);
      if (why.dataset.said !== said) {
        why.dataset.said = said;
        fill(why, el("span", line));
      }
    }
    showFacts();
    showActions();
  }

  function showFacts() {
    const { run: r, cost } = summary;
    const more = cost.subtree && cost.subtree.runs > 1;
    const spent = more ? cost.subtree : cost.own;
    const rows = [
      ["Duration", LIVE.has(r.status) ? time(r.createdAt, "since") : el("span", duration(summary.durationMs ?? 0))],
      ["Attempt", el("span", r.maxAttempts > 1 ? `${r.attempt} of ${r.maxAttempts}` : r.attempt)],
      r.queue && ["Queue", el("a.link", { href: `/studio/runs${toQuery({ queue: r.queue })}` }, r.queue)],
      r.leaseOwner && ["Owner", el("code", r.leaseOwner)],
      r.leaseExpiresAt && ["Lease ends", time(r.leaseExpiresAt)],
      (Number(spent?.costUsd) > 0 || spent?.totalTokens > 0) && [more ? `Cost of ${plural(cost.subtree.runs, "run")}` : "Cost",
        el("span", { title: `${count(spent.inputTokens ?? 0)} in, ${count(spent.outputTokens ?? 0)} out${more ? `; its own: ${money(cost.own.costUsd)}` : ""}` },
          money(spent.costUsd), spent.totalTokens > 0 && el("span.muted", ` · ${compactCount(spent.totalTokens)} tokens`))],
      ["Created", time(r.createdAt, "short")],
      r.completedAt && ["Ended", time(r.completedAt, "short")],
      r.deadlineAt && ["Deadline", time(r.deadlineAt, LIVE.has(r.status) ? "ago" : "short")],
      r.dedupeKey && ["Dedupe key", el("code", r.dedupeKey)],
      r.priority !== 0 && ["Priority", el("span", r.priority)],
      r.failureClass && ["Failure class", el("span.tag", r.failureClass)],
      budgetOf(r) && ["Budget", el("span", budgetOf(r))],
    ].filter(Boolean);
    const key = JSON.stringify(rows.map(([word, node]) => [word, node.dateTime ?? node.textContent]));
    if (facts.dataset.key === key) return;
    facts.dataset.key = key;
    fill(facts, rows.map(([word, node]) => el("div", el("dt", word), el("dd", node))));
  }

  function showActions() {
    if (!canWrite()) return;
    const { run: r } = summary;
    const live = LIVE.has(r.status);
    const ended = r.status === "failed" || r.status === "cancelled";
    const wanted = [
      ended && ["Retry", retry], (ended || r.stalled) && r.recoveryWebhook && ["Recover", recover],
      live && ["Signal", signalRun], ["Fork", forkRun], (live || r.status === "failed") && ["Cancel", cancel, "danger"],
    ].filter(Boolean);
    const key = wanted.map(([word]) => word).join();
    if (actions.dataset.key === key) return;
    actions.dataset.key = key;
    fill(actions, wanted.map(([word, action, kind]) => el("button", { class: kind ?? null, onclick: guard(action) }, word)));
  }

  const guard = (action) => async () => {
    try {
      await action();
    } catch (error) {
      if (!(error instanceof ApiError)) throw error;
      toast(error.message, "error");
    }
    readSummary();
  };

  async function readVerdict() {
    const wanted = ["failed", "cancelled", "stalled"].includes(shownStatus(run())) || run().whyDetail?.kind === "lease_expired";
    if (!wanted) return show(verdict, false);
    const plan = await get(path`/runs/${id}/rerun`, { signal });
    show(verdict, plan.safe !== null);
    if (plan.safe !== null) showVerdict(plan);
  }

  function showVerdict(plan) {
    verdict.className = `card verdict ${plan.safe ? "safe" : "unsafe"}`;
    const buttons = { retry: ["Retry", retry], recover: ["Recover", recover], fork: ["Fork", forkRun] };
    const blocking = plan.steps.filter((step) => step.plan === "stops_for_review");
    fill(verdict,
      el("div.spread",
        el("h2", icon(plan.safe ? "completed" : "review"), el("span", plan.verdict)),
        canWrite() && el("div.row", plan.actions.filter((name) => buttons[name]).map((name, index) =>
          el("button", { class: index === 0 && plan.safe ? "primary" : null, onclick: guard(buttons[name][1]) }, buttons[name][0])))),
      canWrite() && blocking.map((step) => el("details", { open: blocking.length === 1 },
        el("summary", "Decide ", el("strong", step.name)), reviewForm(id, step, () => { readSummary(); readVerdict(); }))),
      plan.steps.length > 0 && el("details", el("summary", "What a rerun would do, step by step"),
        el("div.table-wrap", el("table", el("tbody", plan.steps.map((step) => el("tr",
          el("td", step.name), el("td", planWord(step.plan)), el("td.muted", step.reason))))),
        plan.stepsTruncated && el("p.muted", "The first 1,000 steps."))));
  }

  // --- actions

  async function retry() {
    const plan = await get(path`/runs/${id}/rerun`, { signal });
    if (plan.safe === false) {
      const asked = dialog("Retry all the same?", el("p", plan.verdict), { buttons: [el("button", { value: "" }, "Do not"),
        el("button", { value: "go", class: "danger" }, "Retry")] });
      if (await asked.closed !== "go") return;
    }
    await post(path`/runs/${id}/retry`);
    toast("It is put back.");
  }

  async function recover() {
    await post(path`/runs/${id}/recover`);
    toast("Its recovery webhook is on the way.");
  }

  async function cancel() {
    const asked = dialog("Cancel this run?", [
      el("p", "It ends at once; its worker is told at its next write. Completed steps stay on record."),
      field("Reason", el("input", { name: "reason" })),
    ], { buttons: [el("button", { value: "" }, "Keep it"), el("button", { value: "go", class: "danger" }, "Cancel the run")] });
    if (await asked.closed !== "go") return;
    await post(path`/runs/${id}/cancel`, bodyOf({ reason: new FormData(asked.form).get("reason"), actor: localStorage.getItem("tidebase.actor") ?? "studio" }));
    toast("Cancelled.");
  }

  async function signalRun() {
    const waitsFor = run().whyDetail?.signal ?? "";
    const asked = dialog("Send a signal", [
      field("Name", el("input", { name: "name", required: true, value: waitsFor })),
      field("Payload", jsonInput("payload", { rows: 5 }), "JSON; empty is null"),
    ], { buttons: [el("button", { value: "go", class: "primary" }, "Send")] });
    if (await asked.closed !== "go") return;
    const values = new FormData(asked.form);
    await post(path`/runs/${id}/signals`, bodyOf({ name: values.get("name") }, { payload: values.get("payload") }));
    toast("The signal is sent.");
  }

  async function forkRun() {
    const { askFork } = await import("./compare.js");
    const fork = await askFork(id, [...model.steps.values()], summary, await inputText());
    if (fork) navigate(`/studio/compare${toQuery({ a: id, b: fork.id })}`);
  }

  const inputText = () => (run().inputBytes > 0 ? readPayload(id, "input") : "{}");

  // --- the side panel

  let panelOf = null;

  function openPanel(title, nodes, key) {
    panelOf = key;
    fill(panel, el("header", el("h2", { title }, title),
      el("button", { class: "bare", "aria-label": "Close details", onclick: closePanel }, icon("close"))),
    el("div.body.stack", nodes));
    panel.classList.add("opened");
    panel.scrollTop = 0;
  }

  function closePanel() {
    panelOf = null;
    waterfall.choose(null);
    setQuery({ step: null });
    panel.classList.remove("opened");
    showRunPanel();
  }

  function showRunPanel() {
    if (panelOf) return;
    const { run: r } = summary;
    const key = [r.inputBytes, r.resultBytes, r.errorBytes, r.metadataBytes].join();
    if (panel.dataset.run === key && panel.firstChild && !panel.querySelector("[aria-label='Close details']")) return;
    panel.dataset.run = key;
    const error = [r.status === "failed" ? "Error" : "Error of an earlier attempt", "error", r.errorBytes];
    const kinds = [r.status === "failed" && error, ["Result", "result", r.resultBytes], ["Input", "input", r.inputBytes],
      ["Metadata", "metadata", r.metadataBytes > 2 ? r.metadataBytes : 0], r.status !== "failed" && error].filter((kind) => kind && kind[2] > 0);
    fill(panel, el("header", el("h2", "The run")), el("div.body.stack",
      kinds.map(([word, of, size]) => payload(word, id, of, { size })), kinds.length === 0 && el("p.muted", "It has no input and no result yet.")));
  }

  function select(row) {
    if (row.kind === "run") return closePanel();
    if (row.kind === "child") return navigate(runUrl(row.key));
    if (row.kind === "gate") return showTab("gates");
    if (row.kind !== "step") return;
    waterfall.choose(row.key);
    setQuery({ step: row.key });
    const owner = row.owner ? row.owner.runId : id;
    openPanel(row.name, new StepPanel(model, row, owner).nodes, row.key);
  }

  // --- tabs

  const waterfall = new Waterfall(timeline, { onSelect: select, signal, async onOpen(row) {
    const child = await get(path`/runs/${row.key}/summary`, { signal });
    const own = new Timeline(session.leaseMs);
    own.runId = row.key;
    own.setRun(child.run);
    const { steps } = await get(path`/runs/${row.key}/steps` + toQuery({ limit: 500 }), { signal });
    steps.forEach((step) => own.setStep(step));
    return own;
  } });
  const opened = new Map([["timeline", { element: waterfall.element, update: () => waterfall.schedule() }]]);
  let tab = null;

  function showTabs() {
    const { counts } = summary;
    const list = [["timeline", "Timeline", counts.steps], ["events", "Events", counts.events], ["state", "State", summary.state?.version],
      ["gates", "Gates", counts.gates], ["usage", "Usage", counts.usage], ["children", "Children", counts.children], ["webhooks", "Webhooks", counts.deliveries]];
    if (tabs.childElementCount === 0) {
      tabs.append(...list.map(([name, word]) => el("a", { href: addressOf(name), role: "tab", id: `tab-${name}`, "data-tab": name,
        onclick: (event) => { event.preventDefault(); showTab(name); } }, word, el("span"))));
      tabs.addEventListener("keydown", (event) => {
        const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
        if (!step) return;
        const all = [...tabs.children];
        all[(all.indexOf(document.activeElement) + step + all.length) % all.length].focus();
      });
    }
    list.forEach(([name, , number], index) => {
      const link = tabs.children[index];
      link.setAttribute("aria-selected", String(name === tab));
      link.tabIndex = name === tab ? 0 : -1;
      setText(link.lastChild, number ? compactCount(number) : "");
    });
  }

  const addressOf = (name) => runUrl(id, name === "timeline" ? "" : `?tab=${name}`);

  function showTab(name) {
    if (!TABS[name] && name !== "timeline") name = "timeline";
    if (name === tab) return;
    tab = name;
    setQuery({ tab: name === "timeline" ? null : name });
    if (!opened.has(name)) opened.set(name, TABS[name](model));
    fill(content, opened.get(name).element);
    content.setAttribute("aria-labelledby", `tab-${name}`);
    if (name !== "timeline") {
      panelOf = null;
      panel.classList.remove("opened");
      showRunPanel();
    }
    showTabs();
    opened.get(name).update?.([]);
  }

  // --- live

  function onEvents(batch) {
    const events = batch.map(({ text }) => Object.assign(JSON.parse(text), { text }));
    let needsSteps = false;
    let needsGates = false;
    let needsTree = false;
    for (const event of events) {
      timeline.apply(event);
      model.events.push(event);
      if (event.type.startsWith("step.")) needsSteps = true;
      else if (event.type.startsWith("gate.")) needsGates = true;
      else if (event.type === "run.child.created") needsTree = true;
    }
    summary.counts.events = Math.max(summary.counts.events, events.at(-1).seq);
    if (events.at(-1).seq >= summary.run.eventSeq) {
      if (needsSteps) readNewSteps();
      if (needsGates) readGates();
      if (needsTree) readTree();
      if (events.at(-1).seq > summary.run.eventSeq) readSummarySoon();
    }
    showTabs();
    opened.get(tab)?.update?.(events);
  }

  async function readSummary() {
    summary = await get(path`/runs/${id}/summary`, { signal });
    timeline.setRun(summary.run);
    showHeader();
    showTabs();
    showRunPanel();
    waterfall.schedule();
    for (const listener of model.listeners) listener();
  }
  const readSummarySoon = debounce(() => readSummary().catch(ignoreFaults), 250);

  let lastPosition = 0;
  async function readSteps() {
    for (;;) {
      const { steps, nextCursor } = await get(path`/runs/${id}/steps` + toQuery({ after: lastPosition || null, limit: 1000 }), { signal });
      steps.forEach(keepStep);
      if (!nextCursor) break;
    }
    waterfall.schedule();
  }

  function keepStep(step) {
    model.steps.set(step.id, step);
    timeline.setStep(step);
    lastPosition = Math.max(lastPosition, step.position);
  }
  model.keepStep = keepStep;

  const readNewSteps = debounce(() => readSteps().catch(ignoreFaults), 250);

  const readGates = debounce(async () => {
    const { gates } = await get(path`/runs/${id}?include=gates`, { signal });
    gates.forEach((gate) => timeline.setGate(gate));
    waterfall.schedule();
  }, 60);

  const readTree = debounce(async () => {
    const { runs } = await get(path`/runs/${id}/tree` + toQuery({ limit: 500 }), { signal });
    runs.slice(1).forEach((child) => timeline.setChild(child));
    timeline.order = null;
    waterfall.schedule();
  }, 60);

  const ignoreFaults = (error) => { // the stream and the next poll try again, and the mark says what is amiss
    if (!(error instanceof ApiError) && error.name !== "AbortError") throw error;
  };

  function onState(state) {
    const words = { live: "live", reconnecting: "reconnecting", stale: "stale", paused: "paused", ended: "not live" };
    mark.className = `mark mark-${state}`;
    setText(mark, words[state]);
    if (state === "live" && mark.dataset.lost) readSummary().catch(ignoreFaults);
    mark.dataset.lost = state === "live" ? "" : "1";
  }

  await readSteps();
  if (summary.counts.gates) readGates();
  if (summary.counts.children) readTree();
  showHeader();
  showTab(query.get("tab") ?? "timeline");
  const chosen = timeline.rows.get(query.get("step"));
  if (chosen) select(chosen);
  else showRunPanel();
  waterfall.draw();

  const first = Math.max(0, summary.run.eventSeq - MOST_EVENTS);
  model.firstSeq = first;
  follow((after) => path`/runs/${id}/events` + toQuery({ after, view: "light" }), first, onEvents, onState, signal);
  let polls = 0;
  poll(async () => {
    polls += 1;
    if (LIVE.has(run().status) ? polls % 3 === 0 : polls % 15 === 0) await readSummary();
    if (LIVE.has(run().status) && summary.counts.childrenLive && polls % 3 === 0) readTree();
    if (LIVE.has(run().status) && tab === "timeline") waterfall.schedule();
  }, 1000, signal)();

  return {
    onQuery(parameters) {
      showTab(parameters.get("tab") ?? "timeline");
    },
    keys(key) {
      if (key === "Escape" && panelOf) {
        closePanel();
        return true;
      }
      if ((key === "j" || key === "k") && tab === "timeline") {
        const list = waterfall.shown();
        const index = list.findIndex((row) => row.key === waterfall.chosen) + (key === "j" ? 1 : -1);
        const row = list[Math.max(0, Math.min(list.length - 1, index))];
        waterfall.choose(row.key);
        waterfall.rows.reveal(list.indexOf(row));
        return true;
      }
      if (key === "Enter" && waterfall.chosen) {
        select(waterfall.shown().find((row) => row.key === waterfall.chosen));
        return true;
      }
      return opened.get(tab)?.keys?.(key);
    },
  };
}

const PLAN_WORDS = { replays: "replays", runs: "runs", runs_again: "runs again", stops_for_review: "stops for review", never: "never" };
export const planWord = (plan) => el("span", { class: `act act-${plan === "stops_for_review" ? "stops" : plan}` }, PLAN_WORDS[plan] ?? plan);

function budgetOf(run) {
  const budget = run.metadata?.budget ?? run.metadata?.budgetUsd;
  return budget === undefined || budget === null ? null : typeof budget === "object" ? JSON.stringify(budget) : `$${budget}`;
}

