// Fork a run from a step, with a preview of what is reused; and two runs side by side.

import { follow, get, path, poll, post, query as toQuery } from "./api.js";
import { bodyOf, jsonInput } from "./decide.js";
import { debounce, dialog, duration, el, field, fill, idText, money, plural, setText, skeleton, status, syncRows, time } from "./dom.js";
import { diffTable, readPayload } from "./payload.js";
import { runUrl, setTitle } from "./router.js";
import { outcome, runDuration, shownStatus } from "./why.js";

/** Ask from where to fork, and with what input. Resolves to the new run, or null. */
export async function askFork(runId, steps, summary, inputText) {
  const ordered = steps.sort((a, b) => a.position - b.position);
  const from = el("select", { name: "from", onchange: preview }, ordered.map((step) => el("option", { value: step.name }, step.name)),
    el("option", { value: "" }, "the end: reuse all completed steps"));
  const firstOpen = ordered.find((step) => step.status !== "completed");
  from.value = firstOpen?.name ?? ordered.at(-1)?.name ?? "";
  const input = jsonInput("input", { rows: 8 });
  input.value = inputText.length > 200_000 ? "" : inputText;
  const queue = el("input", { name: "queue", value: summary.run.queue ?? "" });
  const reused = el("div");
  input.addEventListener("input", preview);
  function preview() {
    const at = ordered.findIndex((step) => step.name === from.value);
    const cut = at < 0 ? ordered.length : at;
    const kept = ordered.slice(0, cut).filter((step) => step.status === "completed");
    const again = ordered.filter((step) => !kept.includes(step));
    const list = (word, some) => el("div", el("dt", word), el("dd", some.length ? some.slice(0, 12).map((step) => step.name).join(", ")
      + (some.length > 12 ? ` and ${some.length - 12} more` : "") : "none"));
    fill(reused, el("dl.facts", { role: "status" }, list(`Reused: ${plural(kept.length, "step")}`, kept), list(`Runs again: ${plural(again.length, "step")}`, again)),
      kept.length > 0 && input.value !== inputText && el("p.muted",
        "The input is another one: reused steps keep what they returned for the old one."));
  }
  preview();
  const { form, closed } = dialog("Fork this run", [
    el("p", "A new run of the same workflow. It begins with copies of the checkpoints before the step that you choose."),
    field("Run again from", from), reused, field("Input", input),
    summary.run.queue && field("Queue", queue, "a worker of this queue will take it"),
  ], { buttons: [el("button", { value: "go", class: "primary" }, "Fork")] });
  if (await closed !== "go") return null;
  const values = new FormData(form);
  const changed = values.get("input") !== inputText && values.get("input").trim();
  const { run } = await post(path`/runs/${runId}/fork`, bodyOf({ fromStep: values.get("from"),
    queue: values.get("queue") && values.get("queue") !== summary.run.queue ? values.get("queue") : null },
  changed ? { input: values.get("input") } : {}));
  return run;
}

const SMALL = 65_536;

export async function open({ main, query, signal }) {
  const ids = [query.get("a"), query.get("b")];
  setTitle("Compare");
  const sides = ids.map(() => ({ summary: null, steps: new Map(), head: el("section.card", skeleton(2)) }));
  const body = el("tbody");
  const tally = el("p.muted", { role: "status" });
  const details = el("div.stack");
  const outputs = new Map(); // step name -> whether both outputs are the same, once they were read
  fill(main, el("nav.crumbs", el("a", { href: "/studio/runs" }, "Runs"), "/ side by side"), el("h1", "Side by side"),
    el("div.sides", sides.map((side) => side.head)), tally,
    el("div.card.table-wrap", el("table", el("thead", el("tr", ["Step", "First", "", "Second", "", "Output"].map((word) => el("th", word)))), body)), details);

  async function load() {
    await Promise.all(sides.map(async (side, index) => {
      const [summary, { steps }] = await Promise.all([get(path`/runs/${ids[index]}/summary`, { signal }),
        get(path`/runs/${ids[index]}/steps` + toQuery({ limit: 1000 }), { signal })]);
      side.summary = summary;
      side.steps = new Map(steps.map((step) => [step.name, step]));
      const { run, cost } = summary;
      fill(side.head, el("header", el("h2", el("a", { href: runUrl(run.id) }, index === 0 ? "First: " : "Second: ", run.workflowName)), status(shownStatus(run))),
        el("div.body.stack", idText(run.id), el("dl.facts", [["Duration", runDuration(run) ?? "–"], ["Cost", money(cost.own.costUsd)], ["Created", time(run.createdAt)]]
          .map(([word, what]) => el("div", el("dt", word), el("dd", what)))), el("p.muted", outcome(run))));
    }));
    draw();
    compareOutputs();
  }

  const names = () => [...new Set([...sides[0].steps.keys(), ...sides[1].steps.keys()])];

  function draw() {
    syncRows(body, names(), (name) => name, () => el("tr"), (row, name) => {
      const [a, b] = sides.map((side) => side.steps.get(name));
      fill(row, el("td", name), cells(a), cells(b), el("td", verdict(name, a, b)));
    });
    const differing = names().filter((name) => ["differs", "only in one"].includes(wordOf(name)));
    setText(tally, differing.length ? `${plural(differing.length, "step")} of ${names().length} differ: ${differing.slice(0, 8).join(", ")}` : `No difference found in ${plural(names().length, "step")}.`);
  }

  function cells(step) {
    if (!step) return [el("td.none", "–"), el("td")];
    const took = step.completedAt && step.startedAt && !step.copied ? duration(new Date(step.completedAt) - new Date(step.startedAt)) : "";
    return [el("td", status(step.status)), el("td.num.muted", step.copied ? "reused" : took)];
  }

  function wordOf(name) {
    const [a, b] = sides.map((side) => side.steps.get(name));
    if (!a || !b) return "only in one";
    if (b.copied || a.copied) return "reused";
    if (a.status !== "completed" || b.status !== "completed") return "open";
    if (a.outputBytes !== b.outputBytes) return "differs";
    return outputs.get(name) ?? "reading";
  }

  function verdict(name, a, b) {
    const word = wordOf(name);
    if (word !== "differs") return el("span.muted", word);
    return el("button", { class: "quiet", onclick: async () => {
      const [before, after] = await Promise.all([readPayload(ids[0], "step.output", a.id), readPayload(ids[1], "step.output", b.id)]);
      fill(details, el("section.card", el("header", el("h2", `Output of ${name}`)), el("div.body", diffTable(before, after))));
      details.scrollIntoView({ block: "nearest" });
    } }, "differs: show");
  }

  async function compareOutputs() {
    for (const name of names().filter((one) => wordOf(one) === "reading").slice(0, 200)) {
      const [a, b] = sides.map((side) => side.steps.get(name));
      if (a.outputBytes > SMALL) outputs.set(name, "long");
      else if (!a.outputBytes) outputs.set(name, "same");
      else {
        const [before, after] = await Promise.all([readPayload(ids[0], "step.output", a.id, { signal }), readPayload(ids[1], "step.output", b.id, { signal })]);
        outputs.set(name, before === after ? "same" : "differs");
      }
    }
    draw();
  }

  await load();
  const again = debounce(() => load().catch(() => {}), 300);
  // One stream a tab: the second run is the one that is under way.
  follow((after) => path`/runs/${ids[1]}/events` + toQuery({ after, view: "light" }), sides[1].summary.run.eventSeq, again, () => {}, signal);
  poll(async () => { if (!sides.every((side) => side.summary.run.completedAt)) again(); }, 3000, signal)();
}
