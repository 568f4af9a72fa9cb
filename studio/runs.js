// The list of runs: filters in the address, counts, live rows, keyset pages, and actions on many at once.
//
// The page holds one page of light runs. POST /changes says, under any filter, which ids stand there now and sends only
// the rows whose version differs; nothing is read twice, and no list loads a payload.

import { canWrite, get, laterAgain, poll, post, query as toQuery } from "./api.js";
import { announce, ask, button, compactCount, copyButton, count, debounce, dialog, el, empty, field, fill, icon, iconButton, plural, searchInput, select, setText,
	show, skeleton, status, syncRows, time, toast, zoneNote } from "./dom.js";
import { navigate, runUrl } from "./router.js";
import { outcome, runDuration, shortId, shownStatus } from "./why.js";

const PAGE_SIZE = 50;
const REFRESH_MS = 1500;
const STATUSES = ["running", "waiting", "queued", "pending", "failed", "completed", "cancelled"];
const FILTERS = ["status", "workflow", "queue", "failureClass", "since", "until", "text", "errors", "parent"];
const WORDS = { failureClass: "class", since: "from", until: "before", parent: "children of" };
const ACTIONS = { cancel: ["Cancel", "cancelled", "danger"], retry: ["Retry", "put back", "primary"], delete: ["Delete", "deleted", "danger"] };
const lastPages = new Map(); // what was on the screen for an address: shown at once on the way back

const filtersOf = (parameters) => Object.fromEntries([...parameters].filter(([name, value]) => value && (FILTERS.includes(name) || name.startsWith("metadata."))));

export async function open({ main, query, signal }) {
	let filters = {};
	let paging = {};
	let rows = []; // light runs, in the order of the screen
	let nextCursor = null;
	let allMatching = false;
	const selected = new Set();

	const mark = el("span.mark", { role: "status" }, "loading");
	const search = searchInput("id, error text, queue:mail, key:value", "Search runs: an id, text of an error, workflow:, queue:, status:, or a metadata key and value", null, { "data-search": "" });
	const input = search.lastChild;
	const chips = el("div.row");
	const counts = el("div.counts", { role: "group", "aria-label": "Filter by status" });
	const errorsOnly = button("Errors only", () => change({ errors: filters.errors ? null : "true" }));
	const sort = select("Order", [["newest", "Newest first"], ["oldest", "Oldest first"], ["ended", "Last ended first"]], () => change({ sort: sort.value }));
	const period = select("Created", [["", "Any time"], ["1", "Last hour"], ["24", "Last 24 hours"], ["168", "Last 7 days"], ["720", "Last 30 days"]], () =>
		change({ since: period.value && new Date(Math.floor(Date.now() / 6e4) * 6e4 - period.value * 3600e3).toISOString(), until: null }));
	const all = el("input", { type: "checkbox", "aria-label": "Select all runs on this page", onchange: () => choose(rows.map((run) => run.id), all.checked) });
	const body = el("tbody");
	const table = el("table.runs", el("thead", el("tr", canWrite() && el("th.c-select", all), [["status", "Status"], ["name", "Run"], ["why", "Why, or how it ended"], ["queue", "Queue"],
		["attempt", "Attempt"], ["duration", "Duration"], ["time", "Created"]].map(([name, word]) => el(`th.c-${name}`, word)))), body);
	const nothing = el("div");
	const older = button("", () => navigate(address({ before: nextCursor })));
	const newest = button("First page", () => navigate(address({ before: null })));
	const bulkText = el("span.grow");
	const bulkAll = button("Select all that match", () => {
		allMatching = true;
		announce("All runs that match are selected");
		render();
	}, "quiet");
	const bulk = el("div.bulk", { role: "region", "aria-label": "Selected runs", hidden: true }, bulkText, bulkAll,
		Object.entries(ACTIONS).map(([action, [word, , kind]]) => button(word, () => act(action), kind === "danger" ? kind : "")), button("Clear", clearSelection, "quiet"));
	fill(main, el("header.spread", el("h1", "Runs"), mark),
		el("search.stack", el("div.filters", el("form.grow", { onsubmit: searched }, search), period, sort), el("div.spread", counts, chips)),
		el("div.card", table, nothing), bulk, el("div.row", newest, older, zoneNote()));

	// --- filters

	const address = (changes) => `/studio/runs${toQuery({ ...filters, ...paging, ...changes })}`;
	const change = (changes) => navigate(address({ before: null, ...changes }));

	function showFilters() {
		period.value = ""; // the time itself stands in a chip
		sort.value = paging.sort ?? "newest";
		errorsOnly.setAttribute("aria-pressed", String(Boolean(filters.errors)));
		fill(chips, Object.entries(filters).filter(([name]) => name !== "status" && name !== "errors").map(([name, value]) => {
			const word = WORDS[name] ?? name.replace(/^metadata\./, "");
			return el("span.chip", el("span.clip", { title: value }, `${word}: `, word === "from" || word === "before" ? time(value, "short") : value),
				iconButton("close", `Remove filter ${word}: ${value}`, () => change({ [name]: null })));
		}));
	}

	async function searched(event) {
		event.preventDefault();
		const words = input.value.trim();
		if (!words) return;
		if (/^[\w.-]+$/.test(words)) { // an id leads to its run
			const { runs } = await get("/runs", { text: words, view: "light", limit: 1 });
			if (runs[0]?.id === words) return navigate(runUrl(words));
		}
		input.value = "";
		input.blur();
		change(readSearch(words));
	}

	// --- rows

	function makeRow(run) {
		const cells = Object.fromEntries(["status", "why", "queue", "attempt", "duration"].map((name) => [name, el(`td.c-${name}`)]));
		const box = el("input", { type: "checkbox", "aria-label": `Select ${run.workflowName} ${run.id}`, onchange: () => choose([run.id], box.checked) });
		const row = el("tr", { onclick: (event) => {
			if (!event.target.closest("a, button, input, .c-select") && !getSelection().toString()) navigate(runUrl(run.id));
		} }, canWrite() && el("td.c-select", box), cells.status, el("td.c-name", el("div.run-name", el("a", { href: runUrl(run.id), title: run.workflowName, "data-row": "" }, run.workflowName),
			el("code", { title: run.id }, shortId(run.id)))), cells.why, cells.queue, cells.attempt, cells.duration, el("td.c-time", time(run.createdAt)));
		return Object.assign(row, { parts: cells, box });
	}

	function updateRow(row, run) {
		row.box.checked = allMatching || selected.has(run.id);
		row.setAttribute("aria-selected", String(row.box.checked));
		if (row.version === run.version) return;
		if (row.version) {
			row.classList.remove("fresh");
			requestAnimationFrame(() => row.classList.add("fresh"));
		}
		row.version = run.version;
		fill(row.parts.status, status(shownStatus(run)));
		fill(row.parts.why, outcome(run)).title = row.parts.why.textContent;
		fill(row.parts.queue, run.queue ?? el("span.none", "–"));
		fill(row.parts.attempt, run.maxAttempts > 1 ? `${run.attempt} of ${run.maxAttempts}` : run.attempt);
		fill(row.parts.duration, runDuration(run));
	}

	function render() {
		const focused = document.activeElement;
		syncRows(body, rows, (run) => run.id, makeRow, updateRow);
		if (focused !== document.activeElement && focused.isConnected) focused.focus({ preventScroll: true }); // its row was moved
		show(table, rows.length > 0);
		fill(nothing, rows.length === 0 && nothingHere());
		show(older, Boolean(nextCursor));
		setText(older, rows.length < PAGE_SIZE ? "Search further" : "Next page");
		show(newest, Boolean(paging.before));
		const onPage = rows.filter((run) => selected.has(run.id)).length;
		all.checked = rows.length > 0 && (allMatching || onPage === rows.length);
		show(bulk, allMatching || selected.size > 0);
		setText(bulkText, allMatching ? "All that match the filters" : `${plural(selected.size, "run")} selected`);
		show(bulkAll, !allMatching && onPage === rows.length);
	}

	function nothingHere() {
		if (nextCursor) return empty("Nothing among those that were looked through", "There are more runs: search further below.");
		if (Object.keys(filters).length) return empty("No run matches", el("a.link", { href: "/studio/runs" }, "Show all runs"));
		return empty("No runs yet", "A run appears here as soon as a program creates one: ", el("code", 'tide.enqueue("report")'), ", or ", el("code", "python tidebase.py demo"), " on the command line.");
	}

	// --- reading

	const listQuery = () => ({ ...filters, ...paging, view: "light", limit: PAGE_SIZE });

	async function load() {
		const asked = address();
		const answer = await get("/runs", listQuery());
		if (asked === address()) take(answer.runs, answer.nextCursor);
	}

	async function refresh() {
		const asked = address();
		const known = new Map(rows.map((run) => [run.id, run]));
		try {
			const answer = await post("/changes", { query: toQuery(listQuery()).slice(1), known: Object.fromEntries(rows.map((run) => [run.id, run.version])) }, { signal });
			if (asked !== address()) return;
			const same = answer.runs.length === 0 && answer.ids.join() === rows.map((run) => run.id).join() && answer.nextCursor === nextCursor;
			setMark("live");
			if (same) return;
			for (const run of answer.runs) known.set(run.id, run);
			rows = answer.ids.map((id) => known.get(id)).filter(Boolean);
			take(rows, answer.nextCursor);
			readCounts();
		} catch (error) {
			setMark(error.status === 0 ? "stale" : "reconnecting");
			throw error;
		}
	}

	function take(runs, cursor) {
		rows = runs;
		nextCursor = cursor;
		lastPages.set(address(), { rows, nextCursor });
		setMark("live");
		render();
	}

	const readCounts = debounce(async () => {
		const { counts: found, total } = await get("/counts", { ...filters, status: null });
		const chosen = new Set(filters.status?.split(","));
		const entries = [["All", total], ...STATUSES.map((name) => [name, found[name] ?? { count: 0 }])].filter(([name, { count: many }]) => name === "All" || many > 0 || chosen.has(name));
		syncRows(counts, entries, ([name]) => name, ([name]) => button("", () => toggleStatus(name)), (node, [name, { count: many, more }]) => {
			node.setAttribute("aria-pressed", String(name === "All" ? chosen.size === 0 : chosen.has(name)));
			const number = `${compactCount(many)}${more ? "+" : ""}`;
			if (node.textContent !== `${name} ${number}`) fill(node, name !== "All" && el(`span.status.status-${name}`, icon(name)), `${name} `, el("b", number));
		});
		counts.append(errorsOnly);
	}, 60);

	function toggleStatus(name) {
		const chosen = new Set(name === "All" ? [] : filters.status?.split(","));
		if (name !== "All" && !chosen.delete(name)) chosen.add(name);
		change({ status: [...chosen].join(",") });
	}

	function setMark(state) {
		mark.className = `mark mark-${state}`;
		setText(mark, state);
	}

	// --- selection

	function choose(ids, on) {
		allMatching = false;
		for (const id of ids) selected[on ? "add" : "delete"](id);
		render();
	}

	function clearSelection() {
		selected.clear();
		choose([], false);
	}

	async function act(action) {
		const done = await runBulk(action, allMatching ? { filter: toQuery(filters).slice(1) } : { ids: [...selected] });
		if (!done) return;
		clearSelection();
		refresh().catch(laterAgain);
	}

	async function onQuery(parameters) {
		filters = filtersOf(parameters);
		paging = { sort: parameters.get("sort"), before: parameters.get("before") };
		selected.clear();
		allMatching = false;
		showFilters();
		readCounts();
		const last = lastPages.get(address());
		if (last) take(last.rows, last.nextCursor);
		else if (rows.length === 0) {
			show(table, false);
			fill(nothing, skeleton(12));
		}
		try {
			await load();
		} catch (error) {
			laterAgain(error);
			if (error.status !== 400) throw error;
			rows = [];
			render();
			fill(nothing, el("div.fault", { role: "alert" }, error.message));
		}
	}

	await onQuery(query);
	if (query.get("focus")) input.focus();
	poll(refresh, REFRESH_MS, signal);
	return { onQuery, escape: () => (selected.size || allMatching) && (clearSelection(), true) };
}

const SEARCH_NAMES = { ...Object.fromEntries(FILTERS.map((name) => [name, name])), class: "failureClass" };

/** "status:failed customer:42 timed out" -> filters; values with spaces stand in quotes, the rest is text. */
function readSearch(words) {
	const found = {};
	const text = words.replace(/([^\s:"]+):("([^"]*)"|\S+)/g, (_, name, value, quoted) => {
		found[SEARCH_NAMES[name] ?? `metadata.${name}`] = quoted ?? value;
		return "";
	}).replace(/\s+/g, " ").trim();
	return text ? { ...found, text } : found;
}

/** Say how many an action is for, ask, do it in batches and show a result for each. Resolves to whether it was begun. */
async function runBulk(action, target) {
	const [title, done, kind] = ACTIONS[action];
	const preview = await post("/bulk", { action, ...target, dryRun: true });
	if (preview.count === 0) return toast(`None of them can be ${done}.`);
	const words = `${title} ${count(preview.count)}${preview.more ? "+" : ""} ${preview.count === 1 ? "run" : "runs"}`;
	const asked = await ask(`${words}?`, [
		el("div.card.table-wrap", el("table", el("tbody", preview.sample.map((run) => el("tr", el("td", status(shownStatus(run))), el("td", run.workflowName), el("td", el("code", { title: run.id }, shortId(run.id)))))))),
		preview.count > preview.sample.length && el("p.muted", `and ${count(preview.count - preview.sample.length)} more`),
		action === "cancel" && field("Reason", el("input", { name: "reason" })),
		action === "delete" && el("p", "Their steps, events and state go with them. This cannot be undone."),
	], words, { kind, otherwise: "Keep them" });
	if (!asked) return false;

	const results = el("tbody");
	const summary = el("strong", { role: "status" });
	const list = [];
	let open = true;
	dialog(words, [summary, el("div.card.table-wrap", el("table", results))], copyButton(() => list.map((one) => `${one.id}\t${one.ok ? done : one.error}`).join("\n"), "Copy results", "Copy results"))
		.closed.then(() => { open = false; });
	let { cursor } = preview;
	do { // closing the report stops after the batch that is under way
		let batch;
		try {
			batch = await post("/bulk", { action, ...target, cursor: cursor ?? undefined, reason: asked.reason || undefined, actor: "studio" });
		} catch (error) {
			setText(summary, `${summary.textContent} Stopped: ${error.message}.`);
			return true;
		}
		list.push(...batch.results);
		const refused = list.filter((one) => !one.ok).length;
		setText(summary, `${count(list.length - refused)} ${done}${refused ? `, ${count(refused)} refused` : ""}.`);
		results.append(...batch.results.map((one) => el("tr", el("td", one.ok ? status("completed", done) : status("failed", one.code ?? "refused")),
			el("td", el("a.link", { href: runUrl(one.id) }, el("code", one.id))), el("td.muted", one.error))));
		({ cursor } = batch);
	} while (cursor && open);
	return true;
}
