// The list of runs: filters in the address, counts, live rows, keyset pages, and actions on many at once.
//
// The page holds one page of light runs. POST /changes says, under any filter, which ids stand there now and sends only
// the rows whose version differs; nothing is read twice, and no list loads a payload.

import { ApiError, canWrite, get, poll, post, query as toQuery } from "./api.js";
import { announce, compactCount, copyButton, count, debounce, dialog, el, empty, field, fill, icon, plural, setText, show,
  skeleton, status, syncRows, time, toast, zoneName } from "./dom.js";
import { navigate, runUrl, setTitle } from "./router.js";
import { outcome, runDuration, shortId, shownStatus } from "./why.js";

const PAGE_SIZE = 50;
const REFRESH_MS = 1500;
const STATUSES = ["running", "waiting", "queued", "pending", "failed", "completed", "cancelled"];
const FILTERS = ["status", "workflow", "queue", "failureClass", "since", "until", "text", "errors", "parent"];
const CHIP_WORDS = { failureClass: "class", since: "from", until: "before", parent: "children of" };
const ACTIONS = {
  cancel: { title: "Cancel", done: "cancelled", danger: true },
  retry: { title: "Retry", done: "put back" },
  delete: { title: "Delete", done: "deleted", danger: true },
};
const lastPages = new Map(); // what was on the screen for an address: shown at once on the way back

/** Filters and paging out of an address, as the server takes them. */
function filtersOf(parameters) {
  return Object.fromEntries([...parameters].filter(([name, value]) =>
    value && (FILTERS.includes(name) || name.startsWith("metadata."))));
}

export async function open({ main, query, signal }) {
  let filters = filtersOf(query);
  let paging = pagingOf(query);
  let rows = []; // light runs, in the order of the screen
  let nextCursor = null;
  let at = -1; // the row that the keyboard is on
  let allMatching = false;
  const selected = new Set();
  const lineOf = (run) => rows.find((row) => row.id === run);

  // --- building

  const mark = el("span.mark", { role: "status" }, "loading");
  const input = el("input", { type: "search", "data-search": "", placeholder: "id, error text, or key:value", name: "search",
    "aria-label": "Search runs: an id, text of an error, workflow:, queue:, status: or a metadata key and value" });
  const chips = el("div.chips");
  const counts = el("div.counts", { role: "group", "aria-label": "Filter by status" });
  const errorsOnly = el("button", { "aria-pressed": "false",
    onclick: () => change({ errors: filters.errors ? null : "true" }) }, "Errors only");
  const sort = el("select", { "aria-label": "Order", onchange: () => change({ sort: sort.value === "newest" ? null : sort.value }) },
    [["newest", "Newest first"], ["oldest", "Oldest first"], ["ended", "Last ended first"]].map(([value, word]) =>
      el("option", { value }, word)));
  const period = el("select", { "aria-label": "Created", onchange: () => choosePeriod(period.value) },
    [["", "Any time"], ["1", "Last hour"], ["24", "Last 24 hours"], ["168", "Last 7 days"], ["720", "Last 30 days"],
      ["own", "From … to …"]].map(([value, word]) => el("option", { value }, word)));
  const all = el("input", { type: "checkbox", "aria-label": "Select all runs on this page", onchange: () => selectPage(all.checked) });
  const body = el("tbody");
  const table = el("table.runs",
    el("thead", el("tr",
      canWrite() && el("th.c-select", all),
      el("th.c-status", "Status"), el("th.c-name", "Run"), el("th.c-why", "Why, or how it ended"),
      el("th.c-queue", "Queue"), el("th.c-number.c-attempt", "Attempt"),
      el("th.c-time.c-duration", "Duration"), el("th.c-time", "Created"))),
    body);
  const nothing = el("div", { hidden: true });
  const older = el("button", { onclick: () => goTo({ before: nextCursor }) }, "Next page");
  const newest = el("button", { onclick: () => goTo({ before: null }) }, "First page");
  const bulkText = el("span.grow");
  const bulkAll = el("button", { class: "quiet", onclick: selectMatching });
  const bulk = el("div.bulk", { role: "region", "aria-label": "Selected runs", hidden: true }, bulkText, bulkAll,
    Object.entries(ACTIONS).map(([action, { title, danger }]) =>
      el("button", { class: danger ? "danger" : null, onclick: () => act(action) }, title)),
    el("button", { class: "quiet", onclick: clearSelection }, "Clear"));

  fill(main,
    el("header.spread", el("h1", "Runs"), mark),
    el("search.stack",
      el("div.filters",
        el("form.search", { onsubmit: searched }, icon("search"), input, el("kbd", { "aria-hidden": "true" }, "/")),
        period, sort, el("button", { onclick: chooseFilters }, "Filters")),
      el("div.spread", counts, chips)),
    el("div.card", table, nothing),
    bulk,
    el("div.row", newest, older, el("span.muted", "Times in ", el("span", { "data-zone": "" }, zoneName()))));

  // --- filters

  function addressWith(changes) {
    const values = { ...filters, sort: paging.sort === "newest" ? null : paging.sort, before: paging.before, ...changes };
    return `/studio/runs${toQuery(values)}`;
  }
  const change = (changes) => navigate(addressWith({ before: null, ...changes }));
  const goTo = (changes) => navigate(addressWith(changes));

  function showFilters() {
    period.value = filters.since || filters.until ? "own" : "";
    sort.value = paging.sort;
    errorsOnly.setAttribute("aria-pressed", String(Boolean(filters.errors)));
    const named = Object.entries(filters).filter(([name]) => name !== "status" && name !== "errors");
    syncRows(chips, named, ([name, value]) => `${name}=${value}`, ([name, value]) => {
      const word = CHIP_WORDS[name] ?? name.replace(/^metadata\./, "");
      const what = name === "since" || name === "until" ? time(value, "short") : value;
      return el("span.chip", el("span", { title: value }, `${word}: `, what),
        el("button", { class: "bare", "aria-label": `Remove filter ${word}: ${value}`,
          onclick: () => change({ [name]: null }) }, icon("close")));
    });
  }

  async function searched(event) {
    event.preventDefault();
    const words = input.value.trim();
    if (!words) return;
    if (!/\s/.test(words) && !words.includes(":") && words.length > 2) {
      // An id leads to its run; the list says for any other word whether there is something with it.
      const { runs } = await get(`/runs${toQuery({ text: words, view: "light", limit: 1 })}`, { signal });
      if (runs[0]?.id === words) return navigate(runUrl(words));
    }
    input.value = "";
    input.blur();
    change(readSearch(words));
  }

  function choosePeriod(hours) {
    if (hours === "own") return chooseFilters();
    change({ since: hours ? new Date(Date.now() - hours * 3600e3).toISOString().replace(/:\d\d\.\d+Z/, ":00.000Z") : null, until: null });
  }

  async function chooseFilters() {
    const chosen = await askFilters(filters);
    if (chosen) change(chosen);
    else showFilters();
  }

  // --- rows

  function makeRow(run) {
    const box = el("input", { type: "checkbox", "aria-label": `Select ${run.workflowName} ${run.id}`,
      onchange: () => select(run.id, box.checked) });
    const parts = {
      box, status: el("td.c-status"), why: el("td.c-why"), queue: el("td.c-queue"),
      attempt: el("td.c-number.c-attempt"), duration: el("td.c-time.c-duration"), version: null,
    };
    const row = el("tr", { onclick: (event) => {
      if (event.target.closest("a, button, input, .c-select") || getSelection().toString()) return;
      if (event.metaKey || event.ctrlKey) window.open(runUrl(run.id), "_blank", "noopener");
      else navigate(runUrl(run.id));
    } },
    canWrite() && el("td.c-select", box), parts.status,
    el("td.c-name", el("div.run-name",
      el("a", { href: runUrl(run.id), title: run.workflowName }, run.workflowName), el("code", { title: run.id }, shortId(run.id)))),
    parts.why, parts.queue, parts.attempt, parts.duration,
    el("td.c-time", time(run.createdAt)));
    row.parts = parts;
    return row;
  }

  function updateRow(row, run) {
    const { parts } = row;
    parts.box.checked = allMatching || selected.has(run.id);
    row.setAttribute("aria-selected", String(parts.box.checked));
    if (parts.version === run.version) return;
    if (parts.version !== null) flash(row);
    parts.version = run.version;
    fill(parts.status, status(shownStatus(run)));
    fill(parts.why, outcome(run));
    parts.why.title = parts.why.textContent;
    fill(parts.queue, run.queue ?? el("span.none", "–"));
    setText(parts.attempt, run.maxAttempts > 1 ? `${run.attempt} of ${run.maxAttempts}` : run.attempt);
    fill(parts.duration, runDuration(run) ?? el("span.none", "–"));
  }

  function flash(row) {
    row.classList.remove("fresh");
    void row.offsetWidth; // so that the animation starts again
    row.classList.add("fresh");
  }

  function render() {
    const focused = document.activeElement;
    syncRows(body, rows, (run) => run.id, makeRow, updateRow);
    if (focused?.isConnected && focused !== document.activeElement) focused.focus({ preventScroll: true });
    body.querySelector(".at")?.classList.remove("at");
    if (at >= rows.length) at = rows.length - 1;
    if (at >= 0) body.children[at].classList.add("at");
    show(table, rows.length > 0);
    show(nothing, rows.length === 0);
    if (rows.length === 0) fill(nothing, nothingHere());
    show(older, Boolean(nextCursor));
    setText(older, rows.length < PAGE_SIZE ? "Search further" : "Next page");
    show(newest, Boolean(paging.before));
    showSelection();
  }

  function nothingHere() {
    if (nextCursor) return empty("Nothing among those that were looked through", "There are more runs: search further below.");
    if (Object.keys(filters).length) {
      return empty("No run matches", el("a.link", { href: "/studio/runs" }, "Show all runs"));
    }
    return empty("No runs yet", "A run appears here as soon as a program creates one: ", el("code", 'tide.enqueue("report")'),
      ", or ", el("code", "python tidebase.py demo"), " on the command line.");
  }

  // --- reading

  const listQuery = () => toQuery({ ...filters, view: "light", sort: paging.sort, limit: PAGE_SIZE, before: paging.before });

  async function load() {
    const asked = listQuery();
    const answer = await get(`/runs${asked}`, { signal });
    if (asked !== listQuery()) return;
    ({ runs: rows, nextCursor } = answer);
    keep();
    setMark("live");
    render();
  }

  async function refresh() {
    const asked = listQuery();
    const known = Object.fromEntries(rows.map((run) => [run.id, run.version]));
    try {
      const answer = await post("/changes", { query: asked.slice(1), known }, { signal });
      if (asked !== listQuery()) return;
      const news = new Map(answer.runs.map((run) => [run.id, run]));
      const changed = news.size > 0 || answer.ids.length !== rows.length || answer.ids.some((id, index) => rows[index].id !== id);
      setMark("live");
      if (!changed && nextCursor === answer.nextCursor) return;
      const here = rows[at]?.id;
      rows = answer.ids.map((id) => news.get(id) ?? lineOf(id)).filter(Boolean);
      ({ nextCursor } = answer);
      if (here) at = rows.findIndex((run) => run.id === here);
      keep();
      render();
      readCounts();
    } catch (error) {
      if (error.name === "AbortError") throw error;
      setMark(error.status === 0 ? "stale" : "reconnecting");
    }
  }

  const readCounts = debounce(async () => {
    if (signal.aborted) return;
    const { status: ignored, ...others } = filters;
    const { counts: found, total } = await get(`/counts${toQuery(others)}`, { signal });
    showCounts(found, total);
  }, 60);

  function showCounts(found, total) {
    const chosen = new Set(filters.status?.split(",") ?? []);
    const number = ({ count: many, more }) => `${compactCount(many)}${more ? "+" : ""}`;
    const entries = [["", "All", total], ...STATUSES.map((name) => [name, name, found[name] ?? { count: 0 }])]
      .filter(([name, , { count: many }]) => !name || many > 0 || chosen.has(name));
    syncRows(counts, entries, ([name]) => name, ([name]) =>
      el("button", { onclick: () => toggleStatus(name) }), (button, [name, word, tally]) => {
      const pressed = name ? chosen.has(name) : chosen.size === 0;
      button.setAttribute("aria-pressed", String(pressed));
      const text = `${word} ${number(tally)}`;
      if (button.textContent !== text) fill(button, name && el(`span.status.status-${name}`, icon(name)), `${word} `, el("b", number(tally)));
    });
    counts.append(errorsOnly);
  }

  function toggleStatus(name) {
    const chosen = new Set(name ? filters.status?.split(",") ?? [] : []);
    if (name && !chosen.delete(name)) chosen.add(name);
    change({ status: [...chosen].join(",") || null });
  }

  function setMark(state) {
    const word = { live: "live", reconnecting: "reconnecting", stale: "stale" }[state];
    mark.className = `mark mark-${state}`;
    setText(mark, word);
  }

  const keep = () => lastPages.set(location.search, { rows, nextCursor });

  // --- selection

  function select(id, on) {
    allMatching = false;
    if (on) selected.add(id);
    else selected.delete(id);
    render();
  }

  function selectPage(on) {
    allMatching = false;
    for (const run of rows) on ? selected.add(run.id) : selected.delete(run.id);
    render();
  }

  function selectMatching() {
    allMatching = true;
    render();
    announce("All runs that match are selected");
  }

  function clearSelection() {
    allMatching = false;
    selected.clear();
    render();
  }

  function showSelection() {
    const onPage = rows.filter((run) => selected.has(run.id)).length;
    all.checked = rows.length > 0 && (allMatching || onPage === rows.length);
    all.indeterminate = !all.checked && onPage > 0;
    show(bulk, canWrite() && (allMatching || selected.size > 0));
    setText(bulkText, allMatching ? "All that match the filters" : `${plural(selected.size, "run")} selected`);
    show(bulkAll, !allMatching && onPage === rows.length);
    setText(bulkAll, "Select all that match");
  }

  async function act(action) {
    const target = allMatching ? { filter: toQuery(filters).slice(1) } : { ids: [...selected] };
    if (await runBulk(action, target)) {
      clearSelection();
      refresh();
    }
  }

  // --- keyboard

  function keys(key) {
    if (key === "j" || key === "k") {
      at = Math.max(0, Math.min(rows.length - 1, at + (key === "j" ? 1 : -1)));
      render();
      body.children[at]?.scrollIntoView({ block: "nearest" });
      body.children[at]?.querySelector("a").focus({ preventScroll: true });
    } else if (key === "x" && rows[at] && canWrite()) select(rows[at].id, !selected.has(rows[at].id));
    else if (key === "Enter" && rows[at]) navigate(runUrl(rows[at].id));
    else if (key === "Escape" && (selected.size || allMatching)) clearSelection();
    else return false;
    return true;
  }

  // --- opening, and a change of the address while it is open

  async function show_(parameters) {
    filters = filtersOf(parameters);
    paging = pagingOf(parameters);
    at = -1;
    clearSelection();
    showFilters();
    readCounts();
    const last = lastPages.get(location.search);
    if (last) {
      ({ rows, nextCursor } = last);
      render();
    } else if (rows.length === 0) {
      show(table, false);
      show(nothing, true);
      fill(nothing, skeleton(12));
    }
    await load();
  }

  setTitle("Runs");
  await show_(query);
  if (query.get("focus") === "search") input.focus();
  poll(refresh, REFRESH_MS, signal)();
  return {
    keys,
    onQuery: (parameters) => show_(parameters).catch((error) => {
      if (error.name === "AbortError") return;
      rows = [];
      render();
      fill(nothing, el("div.fault", { role: "alert" }, el("strong", error.message),
        (error.body?.issues ?? []).map((issue) => el("p", `${issue.path}: ${issue.message}`))));
    }),
  };
}

const pagingOf = (parameters) => ({ sort: parameters.get("sort") ?? "newest", before: parameters.get("before") });

const SEARCH_NAMES = { status: "status", workflow: "workflow", queue: "queue", class: "failureClass", parent: "parent",
  since: "since", until: "until" };

/** "status:failed customer:42 timed out" -> filters; values with spaces stand in quotes, the rest is text. */
function readSearch(words) {
  const found = {};
  const text = words.replace(/([^\s:"]+):("([^"]*)"|\S+)/g, (_, name, value, quoted) => {
    found[SEARCH_NAMES[name] ?? `metadata.${name}`] = quoted ?? value;
    return "";
  }).replace(/\s+/g, " ").trim();
  if (text) found.text = text;
  return found;
}

/** Ask for the filters that have no place of their own; resolves to the changes, or null. */
async function askFilters(filters) {
  const localValue = (iso) => {
    if (!iso) return "";
    const at = new Date(iso);
    return new Date(at - at.getTimezoneOffset() * 60_000).toISOString().slice(0, 16);
  };
  const input = (name, attributes = {}) => el("input", { name, value: filters[name] ?? "", ...attributes });
  const metadata = Object.entries(filters).filter(([name]) => name.startsWith("metadata."));
  const pair = metadata[0] ?? ["metadata.", ""];
  const { form, closed } = dialog("Filters", el("div.fields",
    field("Workflow", input("workflow")), field("Queue", input("queue")),
    field("Created from", input("since", { type: "datetime-local", value: localValue(filters.since) }), "in this computer's zone"),
    field("Created before", input("until", { type: "datetime-local", value: localValue(filters.until) })),
    field("Metadata key", el("input", { name: "key", value: pair[0].slice(9) })),
    field("Metadata value", el("input", { name: "value", value: pair[1] })),
    field("Text of an error, or an id", input("text")),
    field("Failure class", input("failureClass"))),
  { buttons: [el("button", { value: "clear", class: "quiet" }, "Clear all"), el("button", { value: "apply", class: "primary" }, "Apply")] });
  const answer = await closed;
  if (answer === "clear") return Object.fromEntries(Object.keys(filters).map((name) => [name, null]));
  if (answer !== "apply") return null;
  const values = Object.fromEntries(new FormData(form));
  const { key, value, since, until, ...others } = values;
  return {
    ...(pair[0] !== "metadata." && { [pair[0]]: null }), ...others,
    since: since && new Date(since).toISOString(), until: until && new Date(until).toISOString(),
    ...(key && value && { [`metadata.${key}`]: value }),
  };
}

/** Preview an action on many runs, ask, do it in batches and show a result for each. Resolves to whether it was begun. */
export async function runBulk(action, target) {
  const { title, done, danger } = ACTIONS[action];
  const preview = await post("/bulk", { action, ...target, dryRun: true });
  if (preview.count === 0) {
    toast(`None of them can be ${done}.`);
    return false;
  }
  const many = `${count(preview.count)}${preview.more ? "+" : ""} ${preview.count === 1 ? "run" : "runs"}`;
  const reason = el("input", { name: "reason", placeholder: "optional" });
  const asked = dialog(`${title} ${many}?`, [
    el("div.card.table-wrap", el("table", el("tbody", preview.sample.map((run) =>
      el("tr", el("td", status(shownStatus(run))), el("td", run.workflowName), el("td", el("code", run.id))))))),
    preview.count > preview.sample.length && el("p.muted", `and ${count(preview.count - preview.sample.length)} more`),
    action === "cancel" && field("Reason", reason),
    action === "delete" && el("p", "Their steps, events and state go with them. This cannot be undone."),
  ], { buttons: [el("button", { value: "" }, "Keep them"),
    el("button", { value: "go", class: danger ? "danger" : "primary" }, `${title} ${many}`)] });
  if (await asked.closed !== "go") return false;

  const results = el("tbody");
  const summary = el("strong", { role: "status" });
  const bar = el("progress", { max: preview.count, value: 0, "aria-label": "Progress" });
  const list = [];
  let stopped = false;
  const report = dialog(`${title} ${many}`, [el("div.spread", summary, bar),
    el("div.card.table-wrap", el("table", results))],
  { buttons: [copyButton(() => list.map((one) => `${one.id}\t${one.ok ? done : one.error}`).join("\n"), "Copy results", "Copy results"),
    el("button", { value: "" }, "Close")] });
  report.closed.then(() => { stopped = true; });
  let cursor = preview.cursor;
  let failed = 0;
  do {
    let batch;
    try {
      batch = await post("/bulk", { action, ...target, cursor: cursor ?? undefined, reason: reason.value || undefined, actor: "studio" });
    } catch (error) {
      if (!(error instanceof ApiError)) throw error;
      setText(summary, `${summary.textContent} Stopped: ${error.message}.`);
      return true;
    }
    list.push(...batch.results);
    failed += batch.results.filter((one) => !one.ok).length;
    bar.value = list.length;
    setText(summary, `${count(list.length - failed)} ${done}${failed ? `, ${count(failed)} refused` : ""}.`);
    if (results.childElementCount < 500) {
      results.append(...batch.results.map((one) => el("tr",
        el("td", one.ok ? status("completed", done) : status("failed", one.code ?? "refused")),
        el("td", el("a.link", { href: runUrl(one.id) }, el("code", one.id))),
        el("td.muted", one.ok ? "" : one.error))));
    }
    ({ cursor } = batch);
  } while (cursor && !stopped);
  return true;
}
