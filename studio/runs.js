// The list of runs: filters in the address, counts, live rows, keyset pages, and actions on many at once.
//
// The page holds one page of light runs. POST /changes says, under any filter, which ids stand there now, and sends only
// the rows whose version differs. No list loads a payload.

import { canWrite, every, get, laterAgain, post, query as toQuery } from "./api.js";
import { announce, ask, button, code, compactCount, copyButton, count, dash, debounce, dialog, el, empty, field, fill, grid, icon, iconButton, link, muted, plainTable, plural,
	searchInput, select, setMark, setText, show, skeleton, status, syncRows, time, toast, zoneNote } from "./dom.js";
import { navigate, runsUrl, runUrl } from "./router.js";
import { outcome, runDuration, shortId, shownStatus } from "./why.js";

const PAGE_SIZE = 50;
const REFRESH_MS = 1500;
const STATUSES = ["running", "waiting", "queued", "pending", "failed", "completed", "cancelled"];
const FILTERS = ["status", "workflow", "queue", "failureClass", "since", "until", "text", "errors", "parent"];
const WORDS = { failureClass: "class", since: "from", until: "before", parent: "children of" };
const ACTIONS = { cancel: ["Cancel", "cancelled", "danger"], retry: ["Retry", "put back", "primary"], delete: ["Delete", "deleted", "danger"] };
const lastPages = new Map(); // what was on the screen for an address: shown at once on the way back

/** The filters and the paging that an address asks for. */
function readAddress(parameters) {
	const filters = Object.fromEntries([...parameters].filter(([name, value]) => value && (FILTERS.includes(name) || name.startsWith("metadata."))));
	return [filters, { sort: parameters.get("sort"), before: parameters.get("before") }];
}

const readPage = (filters, paging) => get("/runs", { ...filters, ...paging, view: "light", limit: PAGE_SIZE });
let early = null;
/** Read the first page while the session is still being read. */
export function begin(parameters) {
	early = readPage(...readAddress(parameters));
	early.catch(() => {}); // who takes it sees the failure
}

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
	const checkbox = (label, onchange) => el("input", { type: "checkbox", "aria-label": label, onchange });
	const all = checkbox("Select all runs on this page", () => choose(rows.map((run) => run.id), all.checked));
	const table = grid((run) => run.id, [
		canWrite() && [all, (run) => checkbox(`Select ${run.workflowName} ${run.id}`, ({ target }) => choose([run.id], target.checked)), "c-select"],
		["Status", (run) => status(shownStatus(run)), "c-status"],
		["Run", (run) => el("div.run-name", el("a", { href: runUrl(run.id), title: run.workflowName, "data-row": "" }, run.workflowName), el("code", { title: run.id }, shortId(run.id))), "c-name"],
		["Why, or how it ended", (run) => {
			const line = el("div.clip", outcome(run));
			line.title = line.textContent;
			return line;
		}, "c-why"],
		["Queue", (run) => run.queue ?? dash(), "c-queue"],
		["Attempt", (run) => (run.maxAttempts > 1 ? `${run.attempt} of ${run.maxAttempts}` : run.attempt), "c-attempt"],
		["Duration", runDuration, "c-duration"],
		["Created", (run) => time(run.createdAt), "c-time"],
	].filter(Boolean), null, { kind: "runs", onRow(row, run) {
		const on = allMatching || selected.has(run.id);
		row.setAttribute("aria-selected", String(on));
		if (canWrite()) row.firstChild.firstChild.checked = on;
		if (row.version && row.version !== run.version) {
			row.classList.remove("fresh");
			requestAnimationFrame(() => row.classList.add("fresh"));
		}
		row.version = run.version;
	} });
	table.element.addEventListener("click", ({ target }) => {
		const row = target.closest("tbody tr");
		if (row && !target.closest("a, button, input, .c-select") && !getSelection().toString()) navigate(runUrl(row.dataset.key));
	});
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
		table.element, bulk, el("div.row", newest, older, zoneNote()));

	// --- filters

	const address = (changes) => runsUrl({ ...filters, ...paging, ...changes });
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

	function render() {
		table.set(rows);
		if (rows.length === 0) fill(table.element, nothingHere());
		show(older, nextCursor);
		setText(older, rows.length < PAGE_SIZE ? "Search further" : "Next page");
		show(newest, paging.before);
		const onPage = rows.filter((run) => selected.has(run.id)).length;
		all.checked = rows.length > 0 && (allMatching || onPage === rows.length);
		show(bulk, allMatching || selected.size > 0);
		setText(bulkText, allMatching ? "All that match the filters" : `${plural(selected.size, "run")} selected`);
		show(bulkAll, !allMatching && onPage === rows.length);
	}

	function nothingHere() {
		if (nextCursor) return empty("Nothing among those that were looked through", "There are more runs: search further below.");
		if (Object.keys(filters).length) return empty("No run matches", link("/studio/runs", "Show all runs"));
		return empty("No runs yet", "A run appears here as soon as a program creates one: ", code('tide.enqueue("report")'), ", or ", code("python tidebase.py demo"), " on the command line.");
	}

	// --- reading

	async function load() {
		const asked = address();
		const answer = await (early ?? readPage(filters, paging));
		if (asked === address()) take(answer.runs, answer.nextCursor);
	}

	async function refresh() {
		const asked = address();
		const known = Object.fromEntries(rows.map((run) => [run.id, run]));
		try {
			const { ids, runs, nextCursor: next } = await post("/changes", { query: toQuery({ ...filters, ...paging, view: "light", limit: PAGE_SIZE }).slice(1),
				known: Object.fromEntries(rows.map((run) => [run.id, run.version])) }, { signal });
			if (asked !== address()) return;
			setMark(mark, "live");
			if (runs.length === 0 && ids.join() === rows.map((run) => run.id).join() && next === nextCursor) return;
			for (const run of runs) known[run.id] = run;
			take(ids.map((id) => known[id]).filter(Boolean), next);
			readCounts();
		} catch (error) {
			setMark(mark, error.status === 0 ? "stale" : "reconnecting");
			throw error;
		}
	}

	function take(runs, cursor) {
		rows = runs;
		nextCursor = cursor;
		lastPages.set(address(), [rows, cursor]);
		setMark(mark, "live");
		render();
	}

	const readCounts = debounce(async () => {
		const { counts: found, total } = await get("/counts", { ...filters, status: null });
		const chosen = new Set(filters.status?.split(","));
		const entries = [["All", total], ...STATUSES.map((name) => [name, found[name]])].filter(([name, { count: many }]) => name === "All" || many > 0 || chosen.has(name));
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
		if (!await runBulk(action, allMatching ? { filter: toQuery(filters).slice(1) } : { ids: [...selected] })) return;
		clearSelection();
		refresh().catch(laterAgain);
	}

	async function onQuery(parameters) {
		[filters, paging] = readAddress(parameters);
		selected.clear();
		allMatching = false;
		showFilters();
		const last = lastPages.get(address());
		if (last) take(...last);
		else if (rows.length === 0) fill(table.element, skeleton(12));
		try {
			await load();
		} catch (error) {
			laterAgain(error);
			if (error.status !== 400) throw error;
			rows = [];
			render();
			fill(table.element, el("div.fault", { role: "alert" }, error.message));
		} finally {
			early = null;
			readCounts();
		}
	}

	await onQuery(query);
	if (query.get("focus")) input.focus();
	every(refresh, REFRESH_MS, signal);
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
	const { count: many, more, sample, cursor: start } = await post("/bulk", { action, ...target, dryRun: true });
	if (many === 0) return toast(`None of them can be ${done}.`);
	const words = `${title} ${count(many)}${more ? "+" : ""} ${many === 1 ? "run" : "runs"}`;
	const asked = await ask(`${words}?`, [
		el("div.card", plainTable(sample.map((run) => [status(shownStatus(run)), run.workflowName, el("code", { title: run.id }, shortId(run.id))]))),
		many > sample.length && el("p.muted", `and ${count(many - sample.length)} more`),
		action === "cancel" && field("Reason", el("input", { name: "reason" })),
		action === "delete" && el("p", "Their steps, events and state go with them. This cannot be undone."),
	], words, { kind, otherwise: "Keep them" });
	if (!asked) return false;

	const results = el("div.stack");
	const summary = el("strong", { role: "status" });
	const list = [];
	let open = true;
	dialog(words, [summary, results], copyButton(() => list.map((one) => `${one.id}\t${one.ok ? done : one.error}`).join("\n"), "Copy results", "Copy results")).closed.then(() => { open = false; });
	for (let cursor = start; cursor !== null && open;) { // closing the report stops after the batch that is under way
		let batch;
		try {
			batch = await post("/bulk", { action, ...target, cursor, reason: asked.reason || undefined, actor: "studio" });
		} catch (error) {
			setText(summary, `${summary.textContent} Stopped: ${error.message}.`);
			return true;
		}
		list.push(...batch.results);
		const refused = list.filter((one) => !one.ok).length;
		setText(summary, `${count(list.length - refused)} ${done}${refused ? `, ${count(refused)} refused` : ""}.`);
		results.append(plainTable(batch.results.map((one) => [one.ok ? status("completed", done) : status("failed", one.code ?? "refused"), link(runUrl(one.id), code(one.id)), muted(one.error)])));
		({ cursor } = batch);
	}
	return true;
}
