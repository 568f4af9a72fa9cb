// What is behind a run's tabs, and the panel of one step.
//
// Each tab is a function of the run's model that gives {element, update?(new events), keys?}; it is built when it is first
// shown and keeps what it has read.

import { canWrite, get, getText, path, post, query as toQuery } from "./api.js";
import { gateForm, reviewForm } from "./decide.js";
import { bytes, copyButton, count, debounce, duration, el, empty, fill, icon, money, plural, setText, show, skeleton, status, time, toast }
  from "./dom.js";
import { items, member } from "./json.js";
import { diffTable, inlinePayload, payload, readPayload } from "./payload.js";
import { runUrl } from "./router.js";
import { VirtualRows } from "./virtual.js";
import { errorLine, outcome, shownStatus } from "./why.js";

const facts = (rows) => el("dl.facts", rows.filter(Boolean).map(([word, ...what]) =>
  el("div", el("dt", word), el("dd", what))));

const headRow = (...words) => el("thead", el("tr", words.map((word) => el("th", word))));

// --- one step

/** Attempts, contract and payloads of a step; its row is read again, since events carry no sizes. */
export class StepPanel {
  constructor(model, row, runId = model.id) {
    Object.assign(this, { model, row, runId });
    this.box = el("div.stack", skeleton(4));
    this.nodes = [this.box];
    this.load();
  }

  async load() {
    const { row, runId, model } = this;
    const after = row.step ? row.step.position - 1 : null;
    const { steps } = await get(path`/runs/${runId}/steps` + toQuery(after === null ? { text: row.name, limit: 100 }
      : { after: Math.max(0, after), limit: 2 }), { signal: model.signal });
    const step = steps.find((one) => one.id === row.key) ?? row.step;
    if (!step) return fill(this.box, el("p.muted", "Its row is not there yet."));
    if (runId === model.id) model.keepStep(step);
    fill(this.box, this.describe(step));
  }

  describe(step) {
    const { runId, row, model } = this;
    const contract = step.resumeContract ?? {};
    const effects = contract.sideEffects ?? [];
    return [
      facts([["Status", status(step.status)], ["Attempt", step.attempt], step.startedAt && ["Began", time(step.startedAt, "precise")],
        step.completedAt && ["Took", duration(new Date(step.completedAt) - new Date(step.startedAt ?? step.createdAt))],
        step.leaseOwner && ["Owner", el("code", step.leaseOwner)], step.copied && ["Copied", "from the run that this is a fork of"]]),
      step.status === "manual_review" && canWrite() && el("section.card", el("header", el("h2", "Decide it")),
        el("div.body", reviewForm(runId, step, () => { this.load(); model.refreshSummary(); }))),
      step.errorBytes > 0 && el("p.error-text", errorLine(step.error)),
      step.errorBytes > 0 && this.errorWithStack(step),
      step.outputBytes > 0 && payload("Output", runId, "step.output", { id: step.id, size: step.outputBytes }),
      step.inputBytes > 0 && payload("Input", runId, "step.input", { id: step.id, size: step.inputBytes }),
      row.attempts.length > 1 && el("section", el("h3", "Attempts"), el("table", el("tbody", row.attempts.map((attempt) =>
        el("tr", el("td", attempt.n), el("td", status(attempt.outcome === "cut" ? "stalled" : attempt.outcome, ATTEMPT_WORDS[attempt.outcome] ?? attempt.outcome)),
          el("td", time(new Date(attempt.from).toISOString(), "precise")),
          el("td.num", attempt.to === null ? "…" : duration(attempt.to - attempt.from))))))),
      el("section.stack", el("h3", "Contract"),
        facts([["Side effects", effects.length ? effects.map((effect) => el("span.tag", String(effect))) : "none declared"],
          ["On a crash", { auto: "runs again", manual: "waits for a review", never: "never runs again" }[contract.replay] ?? contract.replay],
          contract.idempotencyKey && ["Idempotency key", el("code", contract.idempotencyKey), copyButton(contract.idempotencyKey, "Copy the key")],
          ["Input hash", el("code", { title: step.inputHash }, step.inputHash?.slice(0, 12)), copyButton(step.inputHash ?? "", "Copy the input hash")]]),
        step.optionsBytes > 2 && el("details", el("summary", "Options"), payload("Options", runId, "step.options", { id: step.id }))),
    ];
  }

  errorWithStack(step) {
    const stack = el("div");
    readPayload(this.runId, "step.error", step.id, { signal: this.model.signal }).then((text) => {
      const trace = stackOf(text);
      if (trace) fill(stack, el("section.payload", el("header", el("h3", "Stack"), copyButton(trace, "Copy the stack")),
        el("pre", { tabindex: 0, role: "region", "aria-label": "Stack" }, trace)));
    });
    return [stack, payload("Error", this.runId, "step.error", { id: step.id, size: step.errorBytes })];
  }
}

const ATTEMPT_WORDS = { cut: "cut off", held: "ended", review: "no outcome" };

function stackOf(text) {
  for (const name of ["stack", "traceback", "trace"]) {
    const found = member(text, name);
    if (found?.startsWith('"')) return JSON.parse(found);
    if (found?.startsWith("[")) return [...items(found)].map((one) => (one.startsWith('"') ? JSON.parse(one) : one)).join("\n");
  }
  return null;
}

// --- events

function eventsTab(model) {
  let shownTypes = "";
  let text = "";
  let list = [];
  let at = -1;
  const filter = el("input", { type: "search", placeholder: "Filter by name or text", "aria-label": "Filter events",
    oninput: () => { text = filter.value.toLowerCase(); refilter(); } });
  const kind = el("select", { "aria-label": "Type", onchange: () => { shownTypes = kind.value; refilter(); } },
    [["", "All events"], ["run.", "Run"], ["step.", "Steps"], ["step.failed", "Failed steps"], ["gate.", "Gates"], ["state.", "State"],
      ["usage.", "Usage"], ["signal.", "Signals"], ["recovery.", "Recovery"]].map(([value, word]) => el("option", { value }, word)));
  const tally = el("span.muted");
  const table = el("table.events", el("thead", el("tr", el("th.e-seq", "#"),
    el("th.e-time", "Time"), el("th.e-type", "Event"), el("th.e-what", "What"))));
  const rows = new VirtualRows(table, { columns: 4, keyOf: (event) => event.seq, make: makeRow, update: (row, event) =>
    row.classList.toggle("chosen", list[at] === event) }, model.signal);
  const earlier = el("button", { class: "quiet", onclick: readEarlier }, "Read the 1,000 events before");
  const nothing = el("p.empty", { hidden: true }, "No event matches.");

  function makeRow(event) {
    return el("tr", { onclick: () => open(event) }, el("td.e-seq", event.seq),
      el("td.e-time", time(event.createdAt, "precise")),
      el("td.e-type", el("button", { type: "button" }, event.type)),
      el("td.e-what.muted", el("strong", event.name), event.name && " ", describeEvent(event)));
  }

  function open(event) {
    at = list.indexOf(event);
    rows.draw();
    const raw = event.payloadOmitted ? null : member(event.text, "payload");
    model.openPanel(`${event.seq} ${event.type}`, [
      facts([["Time", time(event.createdAt, "precise")], event.name && ["Name", event.name], event.attempt && ["Attempt", event.attempt]]),
      raw === null ? payload("Payload", model.id, "event", { id: event.seq, size: event.payloadBytes }) : inlinePayload("Payload", raw, `event-${event.seq}`),
    ], `event:${event.seq}`);
  }

  const fits = (event) => (!shownTypes || event.type.startsWith(shownTypes)) && (!text || event.text.toLowerCase().includes(text));

  function refilter() {
    list = model.events.filter(fits);
    draw();
  }

  function draw() {
    rows.set(list);
    setText(tally, list.length === model.events.length ? plural(list.length, "event") : `${count(list.length)} of ${plural(model.events.length, "event")}`);
    show(earlier, model.firstSeq > 0);
    show(nothing, list.length === 0);
  }

  async function readEarlier() {
    const from = Math.max(0, model.firstSeq - 1000);
    const raw = await getText(path`/runs/${model.id}/events` + toQuery({ view: "light", after: from, limit: model.firstSeq - from }), { signal: model.signal });
    const events = [...items(raw)].map((one) => Object.assign(JSON.parse(one), { text: one }));
    model.firstSeq = from;
    model.events.unshift(...events);
    refilter();
  }

  list = model.events.filter(fits);
  return {
    element: el("section.card", el("header", el("div.row.grow", el("div.search", icon("search"), filter), kind), tally),
      earlier, table, nothing),
    update(events) {
      list.push(...events.filter(fits));
      if (!events.length) list = model.events.filter(fits);
      draw();
    },
    keys(key) {
      if (key !== "j" && key !== "k") return key === "Enter" && list[at] ? (open(list[at]), true) : false;
      at = Math.max(0, Math.min(list.length - 1, at + (key === "j" ? 1 : -1)));
      rows.reveal(at);
      return true;
    },
  };
}

/** What an event's small payload says in a few words. */
function describeEvent(event) {
  const { payload: p } = event;
  if (!p || typeof p !== "object") return event.payloadOmitted ? bytes(event.payloadBytes) : "";
  const words = [
    event.attempt > 1 && `attempt ${event.attempt}`, p.leaseOwner, p.reason && String(p.reason), errorLine(p.error), p.queue && `queue ${p.queue}`,
    p.for && JSON.stringify(p.for), p.stateVersion && `version ${p.stateVersion.version}${p.stateVersion.label ? ` “${p.stateVersion.label}”` : ""}`,
    p.usage && [p.usage.model, p.usage.totalTokens && `${count(p.usage.totalTokens)} tokens`, p.usage.costUsd !== null && money(p.usage.costUsd)].filter(Boolean).join(", "),
    p.gate && [p.gate.prompt, p.gate.decision, p.gate.actor && `by ${p.gate.actor}`].filter(Boolean).join(" "), p.signal?.name,
    p.decision && `${p.decision}${p.actor ? ` by ${p.actor}` : ""}`,
  ];
  return words.filter((word) => typeof word === "string" && word).join(" · ");
}

// --- state

function stateTab(model) {
  let versions = [];
  let following = true; // at the newest version, moving on with it
  const box = el("div.stack", skeleton(4));
  const range = el("input", { type: "range", min: 0, step: 1, "aria-label": "Version", oninput: () => choose(Number(range.value)) });
  const about = el("div");
  const shown = el("div");
  const against = el("select", { "aria-label": "Compare with", onchange: () => drawDiff() });
  const diff = el("div");
  const step = (by, word) => el("button", { "aria-label": word, onclick: () => choose(Number(range.value) + by) }, icon("chevron", by < 0 ? { transform: "rotate(180)" } : {}));
  const built = el("div.stack",
    el("section.card", el("div.body.stack", el("div.slider", step(-1, "Earlier version"), range, step(1, "Later version")), about, shown)),
    el("section.card", el("header", el("h2", "Changes"), el("label.row", "against", against)), el("div.body", diff)));

  async function load() {
    const last = versions.at(-1)?.id ?? null;
    const news = [];
    for (let after = null; ;) {
      const answer = await get(path`/runs/${model.id}/state/versions` + toQuery({ view: "light", after, limit: 1000 }), { signal: model.signal });
      news.push(...answer.stateVersions);
      if (!answer.nextCursor) break;
      after = answer.nextCursor;
    }
    versions = news.sort((a, b) => (a.liveVersion ?? 0) - (b.liveVersion ?? 0) || a.createdAt.localeCompare(b.createdAt));
    if (versions.length === 0) return fill(box, empty("No state", "A workflow that calls ", el("code", "run.state.set({...})"), " shows its state here, version by version."));
    if (built.parentNode !== box) fill(box, built);
    range.max = versions.length - 1;
    fill(against, versions.map((version, index) => el("option", { value: index }, wordOf(version))));
    if (following || !last) choose(versions.length - 1);
  }

  const streams = () => new Set(versions.map((version) => version.streamName)).size;
  const wordOf = (version) => `${streams() > 1 ? `${version.streamName} ` : ""}${version.version}${version.label ? ` ${version.label}` : ""}`;
  const read = (version) => readPayload(model.id, "state", version.id, { signal: model.signal });

  function choose(index) {
    index = Math.max(0, Math.min(versions.length - 1, index));
    following = index === versions.length - 1;
    range.value = index;
    const version = versions[index];
    range.setAttribute("aria-valuetext", `version ${wordOf(version)}`);
    fill(about, facts([["Version", `${version.version} of ${versions.length}`], streams() > 1 && ["Stream", version.streamName], version.label && ["Label", el("strong", version.label)],
      version.reason && ["Reason", version.reason], version.importance !== "normal" && ["Importance", version.importance],
      version.createdBy && ["By", version.createdBy], ["Time", time(version.createdAt, "precise")]]));
    against.value = Math.max(0, index - 1);
    drawSoon();
  }

  const drawSoon = debounce(async () => {
    const version = versions[Number(range.value)];
    const node = payload("Value", model.id, "state", { id: version.id, size: version.bytes });
    fill(shown, node);
    await drawDiff();
  }, 40);

  async function drawDiff() {
    const [a, b] = [versions[Number(against.value)], versions[Number(range.value)]];
    if (a === b) return fill(diff, el("p.muted", versions.length > 1 ? "The same version." : "There is only one version."));
    fill(diff, diffTable(await read(a), await read(b)));
  }

  load();
  const again = debounce(load, 200);
  return { element: box, update: (events) => { if (events.some(({ type }) => type.startsWith("state.") || type.startsWith("snapshot."))) again(); } };
}

// --- gates

/** Gates from the text of an answer: their payloads stay text. */
export function gatesOf(text) {
  return [...items(text)].map((raw) => ({ ...JSON.parse(raw), raw }));
}

function gatesTab(model) {
  const box = el("div.stack", skeleton(3));
  async function load() {
    const text = await getText(path`/runs/${model.id}?include=gates`, { signal: model.signal });
    const gates = gatesOf(member(text, "gates") ?? "[]");
    if (gates.length === 0) return fill(box, empty("No gates", "A step of a person: ", el("code", 'run.gate("approve", "Send this?")'), "."));
    fill(box, gates.map((gate) => el("article.card",
      el("header", el("h2", gate.name), el("div.row", status(gate.status === "pending" ? "waiting" : gate.status),
        gate.actor && el("span", `by ${gate.actor}`), time(gate.resolvedAt ?? gate.createdAt, "short"))),
      el("div.body.stack", gateBody(gate),
        gate.status === "pending" && canWrite() && gate.resolveToken && gateForm(gate, () => { load(); model.refreshSummary(); })))));
  }
  load();
  const again = debounce(load, 150);
  return { element: box, update: (events) => { if (events.some(({ type }) => type.startsWith("gate."))) again(); } };
}

/** Prompt, data and, once decided, the answer. `gate.raw` is its text. */
export function gateBody(gate) {
  const data = member(gate.raw, "data");
  const answer = member(gate.raw, "decisionPayload");
  return [
    el("p.prompt", gate.prompt),
    (gate.capability || gate.expiresAt) && facts([gate.capability && ["Capability", el("code", typeof gate.capability === "string" ? gate.capability : JSON.stringify(gate.capability))],
      gate.expiresAt && ["Expires", time(gate.expiresAt)]]),
    gate.dataOmitted && payload("Data", gate.runId, "gate.data", { id: gate.id }),
    data && data !== "null" && data !== "{}" && inlinePayload("Data", data, `${gate.id}-data`),
    answer && answer !== "null" && answer !== "{}" && inlinePayload("Answer", answer, `${gate.id}-answer`),
    gate.reviewUrl && el("p.row", copyButton(gate.reviewUrl, "Copy the review link", "Copy review link"),
      el("span.muted", "Whoever has it may decide this gate, without a key.")),
  ];
}

// --- usage

function usageTab(model) {
  const box = el("div.stack", skeleton(3));
  let subtree = false;
  const withChildren = el("input", { type: "checkbox", onchange: () => { subtree = withChildren.checked; load(); } });

  async function load() {
    const { usage, byModel, truncated } = await get(path`/runs/${model.id}/usage` + toQuery({ limit: 1000, subtree: subtree ? "true" : null }), { signal: model.signal });
    if (usage.length === 0 && !subtree) {
      return fill(box, model.summary.counts.children > 0 && el("label.row", withChildren, "With its children"),
        empty("No usage", "Recorded by ", el("code", "run.usage.record(model=…, cost_usd=…)"), "."));
    }
    const byStep = new Map();
    for (const entry of usage) {
      const name = model.steps.get(entry.stepId)?.name ?? "outside of steps";
      byStep.set(name, (byStep.get(name) ?? 0) + Number(entry.costUsd ?? 0));
    }
    fill(box,
      el("div.spread", el("span", el("strong", money(byModel.reduce((sum, group) => sum + Number(group.costUsd ?? 0), 0))),
        ` in ${plural(byModel.reduce((sum, group) => sum + group.entries, 0), "entry", "entries")}`, truncated && " (the first 1,000 below)"),
      model.summary.counts.children > 0 && el("label.row", withChildren, "With its children")),
      meters("By model", byModel.map((group) => [group.model ?? group.key ?? "no model", Number(group.costUsd ?? 0), `${count(group.totalTokens ?? 0)} tokens`])),
      !subtree && meters("By step", [...byStep].sort((a, b) => b[1] - a[1]).slice(0, 30).map(([name, cost]) => [name, cost, ""])),
      el("section.card.table-wrap", el("table.stacked",
        headRow("Time", "Step", "Model", "Label", "In", "Out", "Cost"),
        el("tbody", usage.map((entry) => el("tr",
          el("td", { "data-label": "Time" }, time(entry.createdAt, "short")),
          el("td", { "data-label": "Step" }, model.steps.get(entry.stepId)?.name ?? "–"),
          el("td", { "data-label": "Model" }, [entry.provider, entry.model].filter(Boolean).join(" ") || entry.kind),
          el("td", { "data-label": "Label" }, entry.label ?? (entry.quantity !== null ? `${entry.quantity} ${entry.unit ?? ""}` : "")),
          el("td", { "data-label": "In", class: "num" }, entry.inputTokens === null ? "" : count(entry.inputTokens)),
          el("td", { "data-label": "Out", class: "num" }, entry.outputTokens === null ? "" : count(entry.outputTokens)),
          el("td", { "data-label": "Cost", class: "num", title: entry.costUsd }, money(entry.costUsd))))))));
  }
  load();
  const again = debounce(load, 500);
  return { element: box, update: (events) => { if (events.some(({ type }) => type === "usage.recorded")) again(); } };
}

function meters(title, rows) {
  const most = Math.max(...rows.map(([, cost]) => cost), 1e-12);
  return el("section.card", el("header", el("h2", title)), el("div.table-wrap",
    el("table", el("tbody", rows.map(([name, cost, more]) => {
      const bar = el("div.meter");
      bar.style.width = `${(100 * cost) / most}%`;
      return el("tr", el("td", name), el("td.num", money(cost)), el("td.muted", more),
        el("td", el("div.meter-track", bar)));
    })))));
}

// --- children

function childrenTab(model) {
  const box = el("div.stack", skeleton(3));
  const folded = new Set();
  let runs = [];

  async function load() {
    const answer = await get(path`/runs/${model.id}/tree` + toQuery({ limit: 1000 }), { signal: model.signal });
    ({ runs } = answer);
    if (runs.length < 2) return fill(box, empty("No children", "Runs for parts of its work: ", el("code", 'run.child("name", "workflow")'), "."));
    draw(answer.truncated);
  }

  function draw(truncated) {
    const byParent = Map.groupBy ? Map.groupBy(runs.slice(1), (run) => run.parentRunId) : groupBy(runs.slice(1), (run) => run.parentRunId);
    const rows = [];
    const add = (parent, depth) => {
      for (const run of byParent.get(parent) ?? []) {
        rows.push(rowOf(run, depth, byParent.get(run.id)?.length ?? 0, () => draw(truncated)));
        if (!folded.has(run.id)) add(run.id, depth + 1);
      }
    };
    add(runs[0].id, 0);
    fill(box, el("section.card.table-wrap", el("table.stacked", headRow("Child", "Status", "Workflow", "Why, or how it ended", "Created"),
      el("tbody", rows))), truncated && el("p.muted", "The first 1,000 runs of the tree."));
  }

  function rowOf(run, depth, below, redraw) {
    const name = el("td", el("div.row",
      below > 0 && el("button", { class: "bare", "aria-expanded": String(!folded.has(run.id)), "aria-label": `Children of ${run.name}`,
        onclick: () => { if (!folded.delete(run.id)) folded.add(run.id); redraw(); } }, icon("chevron")),
      el("a.link", { href: runUrl(run.id) }, run.name ?? run.id)));
    name.style.paddingLeft = `${0.6 + depth * 1.4}rem`;
    return el("tr", name, el("td", status(shownStatus(run))), el("td", { "data-label": "Workflow" }, run.workflowName),
      el("td.muted", outcome(run)), el("td", { "data-label": "Created" }, time(run.createdAt)));
  }

  load();
  const again = debounce(load, 300);
  model.listeners.add(() => { if (model.summary.counts.childrenLive > 0 && box.isConnected) again(); });
  return { element: box, update: (events) => { if (events.some(({ type }) => type === "run.child.created")) again(); } };
}

function groupBy(list, keyOf) {
  const groups = new Map();
  for (const item of list) groups.set(keyOf(item), [...(groups.get(keyOf(item)) ?? []), item]);
  return groups;
}

// --- webhooks

function webhooksTab(model) {
  const box = el("div.stack", skeleton(3));
  async function load() {
    const { deliveries, nextCursor } = await get(path`/runs/${model.id}/deliveries` + toQuery({ limit: 200 }), { signal: model.signal });
    if (deliveries.length === 0) return fill(box, empty("No webhooks", "This run has no recovery webhook and no channel, or nothing has been sent yet."));
    fill(box, el("section.card.table-wrap", el("table.stacked",
      headRow("Status", "Event", "To", "Tries", "Answer", "Created", ""), el("tbody", deliveries.map(rowOf)))),
    nextCursor && el("p.muted", "The newest 200."));
  }

  function rowOf(delivery) {
    const open = () => model.openPanel(delivery.eventType ?? delivery.reason, [
      facts([["Status", status(delivery.status === "pending" ? "waiting" : delivery.status, delivery.status)], ["Kind", delivery.kind], ["Tries", delivery.attempts],
        delivery.nextAttemptAt && delivery.status === "pending" && ["Next try", time(delivery.nextAttemptAt)],
        delivery.httpStatus && ["HTTP", delivery.httpStatus], ["Id", el("code", delivery.id), copyButton(delivery.id, "Copy the delivery's id")]]),
      el("p.mono", delivery.url), delivery.errorText && el("p.error-text", delivery.errorText),
      delivery.payloadBytes > 0 && payload("Body", model.id, "delivery", { id: delivery.id, size: delivery.payloadBytes }),
      delivery.responseBytes > 0 && payload("Answer", model.id, "delivery.response", { id: delivery.id, size: delivery.responseBytes }),
    ], `delivery:${delivery.id}`);
    return el("tr",
      el("td", status(delivery.status === "pending" ? "waiting" : delivery.status, delivery.status)),
      el("td", { "data-label": "Event" }, el("button", { class: "quiet", onclick: open }, delivery.eventType ?? delivery.reason)),
      el("td", { "data-label": "To", class: "clip", title: delivery.url }, delivery.url),
      el("td", { "data-label": "Tries", class: "num" }, delivery.attempts),
      el("td", { "data-label": "Answer" }, delivery.httpStatus ?? "", " ", el("span.error-text", delivery.errorText)),
      el("td", { "data-label": "Created" }, time(delivery.createdAt)),
      el("td", canWrite() && delivery.status !== "pending" && el("button", { onclick: async () => {
        try {
          await post(path`/runs/${model.id}/deliveries/${delivery.id}/resend`);
          toast("It is sent again.");
        } catch (error) {
          toast(error.message, "error");
        }
        load();
      } }, "Resend")));
  }
  load();
  model.listeners.add(() => { if (box.isConnected) load(); });
  return { element: box };
}

export const TABS = { events: eventsTab, state: stateTab, gates: gatesTab, usage: usageTab, children: childrenTab, webhooks: webhooksTab };
