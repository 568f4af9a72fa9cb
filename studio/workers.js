// Workers: who asks for work, from which queues, what they hold, and when they were last heard.

import { get, poll } from "./api.js";
import { count, el, empty, fill, idText, plural, skeleton, syncRows, time, now } from "./dom.js";
import { runUrl } from "./router.js";

const QUIET_MS = 60_000;

export async function open({ main, signal }) {
  const body = el("tbody");
  const table = el("table.stacked", el("thead", el("tr", ["Worker", "Queues", "Workflows", "Runs", "Since", "Last heard"].map((word) => el("th", word)))), body);
  const box = el("div.card.table-wrap", skeleton());
  const tally = el("span.muted");
  fill(main, el("header.spread", el("h1", "Workers"), tally), box);

  function cells(worker) {
    const quiet = now() - new Date(worker.lastHeardAt ?? worker.lastAskedAt) > QUIET_MS;
    return [
      el("td", el("div.row", el("span", { class: `mark ${quiet ? "mark-reconnecting" : "mark-live"}` }, el("span.offscreen", quiet ? "quiet" : "there")),
        worker.id ? idText(worker.id) : el("span.muted", "a client without a name"))),
      el("td", { "data-label": "Queues" }, el("span.row", worker.queues.map((name) => el("span.tag", name)))),
      el("td", { "data-label": "Workflows" }, worker.workflows ? worker.workflows.join(", ") : el("span.muted", "all")),
      el("td", { "data-label": "Runs" }, worker.running === 0 ? el("span.none", "none") : el("details", el("summary", plural(worker.running, "run")),
        worker.runs.map((run) => el("div.row", el("a.link", { href: runUrl(run.id) }, run.workflowName), el("code.muted", run.id), "for ", time(run.since, "since"))),
        worker.running > worker.runs.length && el("span.muted", `and ${count(worker.running - worker.runs.length)} more`))),
      el("td", { "data-label": "Since" }, time(worker.since)), el("td", { "data-label": "Last heard" }, time(worker.lastHeardAt ?? worker.lastAskedAt)),
    ];
  }

  async function load() {
    const { workers } = await get("/workers", { signal });
    fill(tally, workers.length ? plural(workers.length, "worker") : null);
    if (workers.length === 0) {
      return fill(box, empty("No worker has asked for work", "A worker is your own process: ", el("code", 'tide.work(queues=["default"])'), ". Queued runs wait until one asks."));
    }
    if (table.parentNode !== box) fill(box, table);
    syncRows(body, workers, (worker) => worker.id ?? worker.queues.join(), () => el("tr"), (row, worker) => {
      const key = JSON.stringify([worker, now() - new Date(worker.lastHeardAt ?? worker.lastAskedAt) > QUIET_MS]);
      if (row.dataset.is === key) return;
      row.dataset.is = key;
      const open = row.querySelector("details")?.open;
      fill(row, cells(worker));
      if (open && row.querySelector("details")) row.querySelector("details").open = true;
    });
  }
  await load();
  poll(load, 2500, signal)();
}
