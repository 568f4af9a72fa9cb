// Queues: how much waits and runs, the last hour minute by minute, caps, pause and resume.

import { canWrite, get, path, poll, put, query as toQuery } from "./api.js";
import { compactCount, count, dialog, duration, el, empty, field, fill, plural, setText, skeleton, status, syncRows, toast } from "./dom.js";

const REFRESH_MS = 3000;

export async function open({ main, signal }) {
  const box = el("div.card.table-wrap", skeleton());
  const body = el("tbody");
  const table = el("table.stacked", el("thead", el("tr", ["Queue", "Ready or delayed", "Running", "Waiting", "Oldest ready", "Last hour", "Caps", ""].map((word, index) =>
    el("th", { class: index > 0 && index < 5 ? "num" : null }, word)))), body);
  fill(main, el("header.spread", el("h1", "Queues")), box);

  function makeRow(queue) {
    const parts = { name: el("td"), queued: cell("Ready or delayed"), running: cell("Running"), waiting: cell("Waiting"), oldest: cell("Oldest ready"),
      hour: el("td", { "data-label": "Last hour" }), caps: el("td", { "data-label": "Caps" }), actions: el("td") };
    const row = el("tr", Object.values(parts));
    row.parts = parts;
    const readMinutes = () => get(path`/queues/${queue.name}/minutes`, { signal }).then(({ minutes }) => fill(parts.hour, spark(minutes)));
    poll(() => (row.isConnected ? readMinutes() : null), 30_000, signal);
    readMinutes().catch(() => {});
    return row;
  }
  const cell = (word) => el("td.num", { "data-label": word });

  function updateRow(row, queue) {
    const { parts } = row;
    const key = JSON.stringify(queue);
    if (row.dataset.is === key) return;
    row.dataset.is = key;
    const config = queue.config ?? {};
    fill(parts.name, el("div.row", el("a", { href: `/studio/runs${toQuery({ queue: queue.name })}` }, el("strong", queue.name)), config.paused && status("paused")));
    const link = (number, name) => (number ? el("a.link", { href: `/studio/runs${toQuery({ queue: queue.name, status: name })}` }, count(number)) : el("span.none", "0"));
    fill(parts.queued, link(queue.queued, "queued"));
    fill(parts.running, link(queue.running, "running"), config.concurrency ? ` of ${count(config.concurrency)}` : null);
    fill(parts.waiting, link(queue.waiting, "waiting"));
    setText(parts.oldest, queue.oldestReadyMs === null || queue.oldestReadyMs === undefined ? "–" : duration(queue.oldestReadyMs));
    setText(parts.caps, [config.concurrency && `${count(config.concurrency)} at once`, config.ratePerMinute && `${count(config.ratePerMinute)} a minute`, config.invokeUrl && "push"].filter(Boolean).join(", ") || "none");
    fill(parts.actions, canWrite() && el("div.row",
      el("button", { onclick: () => change(queue, { paused: !config.paused }) }, config.paused ? "Resume" : "Pause"),
      el("button", { class: "quiet", onclick: () => edit(queue) }, "Edit caps")));
  }

  async function change(queue, changes) {
    try {
      await put(path`/queues/${queue.name}/config`, changes);
    } catch (error) {
      return toast(error.message, "error");
    }
    if (changes.paused !== undefined) toast(changes.paused ? `${queue.name} is paused: it gives out no runs; those that run go on.` : `${queue.name} gives out runs again.`);
    await load();
  }

  async function edit(queue) {
    const config = queue.config ?? {};
    const { form, closed } = dialog(`Caps of ${queue.name}`, el("div.fields",
      field("Runs at once", el("input", { name: "concurrency", type: "number", min: 1, value: config.concurrency ?? "" }), "empty: no cap"),
      field("Claims a minute", el("input", { name: "ratePerMinute", type: "number", min: 1, value: config.ratePerMinute ?? "" }), "empty: no cap"),
      el("div.all", field("Push to", el("input", { name: "invokeUrl", type: "url", value: config.invokeUrl ?? "" }), "address of your app that gets a webhook for each ready run; empty: workers ask"))),
    { buttons: [el("button", { value: "go", class: "primary" }, "Save")] });
    if (await closed !== "go") return;
    const values = new FormData(form);
    const whole = (name) => (values.get(name) ? Number(values.get(name)) : null);
    await change(queue, { concurrency: whole("concurrency"), ratePerMinute: whole("ratePerMinute"), invokeUrl: values.get("invokeUrl") || null });
  }

  async function load() {
    const { queues } = await get("/queues", { signal });
    if (queues.length === 0) {
      return fill(box, empty("No queues yet", "A queue is there as soon as something is put on it: ", el("code", 'tide.enqueue("report", queue="default")'), "."));
    }
    if (table.parentNode !== box) fill(box, table);
    syncRows(body, queues, (queue) => queue.name, makeRow, updateRow);
  }
  await load();
  poll(load, REFRESH_MS, signal)();
}

/** Claims as bars upwards and failures as bars downwards, a minute each. */
function spark(minutes) {
  const claims = minutes.reduce((sum, minute) => sum + minute.claims, 0);
  const failures = minutes.reduce((sum, minute) => sum + minute.failures, 0);
  const most = Math.max(1, ...minutes.map((minute) => Math.max(minute.claims, minute.failures)));
  const text = `${plural(claims, "claim")} and ${plural(failures, "failure")} in the last hour, at most ${compactCount(most)} in a minute`;
  if (claims + failures === 0) return el("span.none", "quiet");
  return el("svg.spark", { viewBox: "0 0 120 24", role: "img", "aria-label": text, preserveAspectRatio: "none" }, el("title", text),
    el("line.base", { x1: 0, x2: 120, y1: 16.5, y2: 16.5, "stroke-width": 0.5 }),
    minutes.map((minute, index) => [
      minute.claims > 0 && el("rect.ok", { x: index * 2, width: 1.5, y: 16 - Math.max(1, (15 * minute.claims) / most), height: Math.max(1, (15 * minute.claims) / most) }),
      minute.failures > 0 && el("rect.bad", { x: index * 2, width: 1.5, y: 17, height: Math.max(1, (7 * minute.failures) / most) }),
    ]));
}
