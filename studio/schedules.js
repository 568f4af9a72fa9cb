// Schedules: when they fire next, on and off, run now; and a form that shows the next five fires as one types.

import { canWrite, getText, path, poll, post, put, query as toQuery, remove } from "./api.js";
import { bodyOf, jsonInput } from "./decide.js";
import { debounce, dialog, el, empty, field, fill, icon, skeleton, status, syncRows, time, toast, wholeInstant, zoneName } from "./dom.js";
import { items, member } from "./json.js";
import { runUrl } from "./router.js";

export async function open({ main, signal }) {
  const box = el("div.card.table-wrap", skeleton());
  const body = el("tbody");
  const table = el("table.stacked", el("thead", el("tr", ["Schedule", "", "Cron", "Workflow", "Queue", "Next", "Last", ""].map((word) => el("th", word)))), body);
  fill(main, el("header.spread", el("h1", "Schedules"),
    el("div.row", el("span.muted", "Times in ", el("span", { "data-zone": "" }, zoneName())),
      canWrite() && el("button", { class: "primary", onclick: () => edit(null) }, "New schedule"))), box);

  function cells(schedule) {
    return [
      el("td", el("strong", schedule.name)),
      el("td", schedule.enabled ? status("live", "on") : status("paused", "off")),
      el("td", { "data-label": "Cron" }, el("span", el("code", schedule.cron), el("span.muted", ` ${schedule.timezone}`))),
      el("td", { "data-label": "Workflow" }, el("a.link", { href: `/studio/runs${toQuery({ "metadata.schedule": schedule.name })}` }, schedule.workflowName)),
      el("td", { "data-label": "Queue" }, schedule.queue),
      el("td", { "data-label": "Next" }, schedule.enabled && schedule.nextRunAt ? el("span", time(schedule.nextRunAt, "short"), el("span.muted", " ", time(schedule.nextRunAt))) : el("span.none", "–")),
      el("td", { "data-label": "Last" }, time(schedule.lastEnqueuedAt)),
      el("td", canWrite() && el("div.row",
        el("button", { onclick: () => act(() => runNow(schedule)) }, "Run now"),
        el("button", { onclick: () => act(() => save(schedule, { enabled: !schedule.enabled })) }, schedule.enabled ? "Disable" : "Enable"),
        el("button", { class: "quiet", onclick: () => edit(schedule) }, "Edit"),
        el("button", { class: "quiet danger", onclick: () => forget(schedule) }, "Delete"))),
    ];
  }

  async function act(action) {
    try {
      await action();
    } catch (error) {
      toast(error.body?.issues?.map((issue) => `${issue.path}: ${issue.message}`).join("; ") ?? error.message, "error");
    }
    await load();
  }

  async function runNow(schedule) {
    const { run } = await post(path`/schedules/${schedule.name}/run`);
    toast(`Enqueued as ${run.id}.`);
    open_.href = runUrl(run.id);
  }
  const open_ = el("a"); // where the last run that was begun here stands

  /** Its fields with some changed; the input goes back as the text that came. */
  const save = (schedule, changes) => put(path`/schedules/${schedule.name}`, bodyOf({ cron: schedule.cron, timezone: schedule.timezone,
    workflowName: schedule.workflowName, queue: schedule.queue, maxAttempts: schedule.maxAttempts, enabled: schedule.enabled, ...changes }, { input: schedule.inputText }));

  async function forget(schedule) {
    const asked = dialog(`Delete ${schedule.name}?`, el("p", "It fires no more. Runs that it enqueued stay."), { buttons: [el("button", { value: "" }, "Keep it"), el("button", { value: "go", class: "danger" }, "Delete")] });
    if (await asked.closed === "go") await act(() => remove(path`/schedules/${schedule.name}`));
  }

  async function edit(schedule) {
    const answer = await askSchedule(schedule);
    if (answer) await act(() => put(path`/schedules/${answer.name}`, answer.body));
  }

  async function load() {
    const text = await getText("/schedules", { signal });
    const schedules = [...items(member(text, "schedules"))].map((raw) => ({ ...JSON.parse(raw), inputText: member(raw, "input") }));
    if (schedules.length === 0) {
      return fill(box, empty("No schedules", "A schedule enqueues a run whenever its cron expression says, once, however many servers there are."));
    }
    if (table.parentNode !== box) fill(box, table);
    syncRows(body, schedules, (schedule) => schedule.name, () => el("tr"), (row, schedule) => {
      const key = JSON.stringify(schedule);
      if (row.dataset.is === key) return;
      row.dataset.is = key;
      fill(row, cells(schedule));
    });
  }
  await load();
  poll(load, 5000, signal)();
}

/** The form of a schedule; resolves to {name, body}, or null. */
async function askSchedule(schedule) {
  const value = (name, otherwise) => schedule?.[name] ?? otherwise;
  const fires = el("div", { role: "status" });
  const cron = el("input", { name: "cron", required: true, value: value("cron", "0 9 * * 1-5"), oninput: preview, class: "mono", autocomplete: "off" });
  const zone = el("input", { name: "timezone", required: true, value: value("timezone", Intl.DateTimeFormat().resolvedOptions().timeZone ?? "UTC"), oninput: preview, list: "zones" });
  const zones = el("datalist", { id: "zones" }, (Intl.supportedValuesOf?.("timeZone") ?? ["UTC"]).map((name) => el("option", { value: name })));
  const input = jsonInput("input", { rows: 5 });
  input.value = schedule?.inputText ?? "{}";
  const ask = debounce(async () => {
    const asked = [cron.value, zone.value].join();
    try {
      const { next } = await post("/schedules/preview", { cron: cron.value, timezone: zone.value });
      if (asked !== [cron.value, zone.value].join()) return;
      cron.setCustomValidity("");
      zone.setCustomValidity("");
      fill(fires, next.length ? el("ol.fires", next.map((at) => el("li", { title: wholeInstant(at) }, inZone(at, zone.value), el("span.muted", " ", time(at))))) : el("p.muted", "It never fires."));
    } catch (error) {
      const issue = error.body?.issues?.[0];
      (issue?.path === "timezone" ? zone : cron).setCustomValidity(issue?.message ?? error.message);
      fill(fires, el("p.error-text", issue ? `${issue.path}: ${issue.message}` : error.message));
    }
  }, 120);
  function preview() {
    ask();
  }
  const { form, closed } = dialog(schedule ? `Schedule ${schedule.name}` : "New schedule", el("div.fields",
    field("Name", el("input", { name: "name", required: true, maxlength: 512, value: value("name", ""), readonly: Boolean(schedule) })),
    field("Workflow", el("input", { name: "workflowName", required: true, value: value("workflowName", "") })),
    field("Cron", cron, "minute hour day month weekday"), field("Time zone", zone),
    el("section.all.payload", el("header", el("h3", "Next fires"), icon("clock")), el("div.dialog-body", fires)),
    field("Queue", el("input", { name: "queue", required: true, value: value("queue", "default") })),
    field("Attempts", el("input", { name: "maxAttempts", type: "number", min: 1, value: value("maxAttempts", 3) })),
    el("div.all", field("Input", input, "JSON")), zones),
  { buttons: [el("button", { value: "go", class: "primary" }, "Save")] });
  ask();
  if (await closed !== "go") return null;
  const { name, input: text, maxAttempts, ...fields } = Object.fromEntries(new FormData(form));
  return { name, body: bodyOf({ ...fields, maxAttempts: Number(maxAttempts), enabled: value("enabled", true) }, { input: text }) };
}

const inZone = (iso, timeZone) => new Intl.DateTimeFormat("en-GB", { timeZone, weekday: "short", day: "numeric", month: "short", hour: "2-digit", minute: "2-digit", timeZoneName: "short" }).format(new Date(iso));
