// The list of runs: filters in the address, counts, live rows, keyset pages, and actions on many at once. POST /changes
// says which ids stand on the page now, and sends only the rows whose version differs.

import { breathe, canWrite, every, frame, get, laterAgain, navigate, post, query as toQuery, runsUrl, runUrl
	} from "./api.js";
import { ask, button, checkbox, code, compactCount, count, dash, debounce, dialog, duration, el, empty, fault, field,
	fill, grid, heading, icon, iconButton, input, link, muted, plainTable, plural, row as inRow, searchInput, select,
	setMark, setState, setText, show, status, strong, syncRows, tag, time, toast } from "./dom.js";

const PAGE_SIZE = 50;
const SCREENFUL = 20; // rows that are drawn first, the rest a moment later
const REFRESH_MS = 1500;
const MOST_OF_ERROR = 300; // characters of a message that the server sends in a line
const FILTERS = ["status", "workflow", "queue", "failureClass", "since", "until", "text", "errors", "parent"];
const WORDS = { failureClass: "class", since: "from", until: "before", parent: "children of" };
const SORTS = [["newest", "Newest first"], ["oldest", "Oldest first"], ["ended", "Last ended first"]];
const PERIODS = [["", "Any time"], ["1", "Last hour"], ["24", "Last 24 hours"], ["168", "Last 7 days"]];
const ACTIONS = { cancel: ["Cancel", "cancelled", "danger"], retry: ["Retry", "put back"],
	delete: ["Delete", "deleted", "danger"] };
const SEARCH_LABEL = "Search runs: an id, text of an error, workflow:, queue:, status:, or key:value of the metadata";

function readAddress(parameters) {
	const filters = Object.fromEntries([...parameters].filter(([name, value]) =>
		value && (FILTERS.includes(name) || name.startsWith("metadata."))));
	return [filters, { sort: parameters.get("sort"), before: parameters.get("before") }];
}

/** Of the page's runs those come that are not in `known`, by id, or have another version. */
const readPage = (filters, paging, known = {}) => post("/changes",
	{ known, query: toQuery({ ...filters, ...paging, limit: PAGE_SIZE }).slice(1) }, { signal: frame.signal });

let first = null; // the answer for a visit that begins here, on its way while the session is read
if (/^\/studio(\/runs)?\/?$/.test(location.pathname)) {
	first = readPage(...readAddress(new URLSearchParams(location.search)));
	first.catch(() => { first = null; });
}

export async function runsPage({ main, query, signal }) {
	let filters = {};
	let paging = {};
	let rows = []; // light runs, in the order of the screen
	let nextCursor = null;
	let shown = null; // the address of these rows; null when the server refused its filters
	let allMatching = false;
	const selected = new Set();

	const mark = el("span.mark", { role: "status" });
	const search = searchInput("id, error text, queue:mail, key:value", SEARCH_LABEL, null, { "data-search": "" });
	const typed = search.lastChild;
	const chips = el("div.row");
	const counts = el("div.counts", { role: "group", label: "Filter by status" });
	const errorsOnly = button("Errors only", () => change({ errors: filters.errors ? null : "true" }));
	const sort = select("Order", SORTS, () => change({ sort: sort.value }));
	const period = select("Created", PERIODS, ({ target: { value: hours } }) =>
		change({ since: hours && new Date(Date.now() - hours * 36e5).toISOString(), until: null }));
	const all = checkbox("Select all runs on this page", () => choose(rows.map((run) => run.id), all.checked));
	const table = grid("id", [
		canWrite() && [all, (run) => checkbox(`Select ${run.workflowName} ${run.id}`,
			({ target }) => choose([run.id], target.checked)), "c-select"],
		["Status", runStatus, "c-status"],
		["Run", ({ id, workflowName }) => el("div.run-name",
			el("a", { href: runUrl(id), title: workflowName, "data-row": "" }, workflowName), shortCode(id)), "c-name"],
		["Why, or how it ended", (run) => {
			const line = el("div.clip", outcome(run));
			line.title = line.textContent;
			return line;
		}, "c-why"],
		["Queue", ({ queue }) => queue ?? dash(), "c-queue"],
		["Attempt", attemptWords, "c-attempt"],
		["Duration", runDuration, "c-duration"],
		["Created", "createdAt", "c-time"],
	], null, { kind: "runs", onRow(row, run) {
		const chosen = allMatching || selected.has(run.id);
		setState(row, "selected", chosen);
		if (canWrite()) row.firstChild.firstChild.checked = chosen;
	} });
	table.addEventListener("click", ({ target }) => {
		const row = target.closest("tbody tr");
		if (!row || target.closest("a, button, input, .c-select") || getSelection().toString()) return;
		navigate(runUrl(row.dataset.key));
	});
	const older = button("", () => navigate(address({ before: nextCursor })));
	const newest = button("First page", () => navigate(address({ before: null })));
	const bulkText = el("span.grow", { role: "status" });
	const bulkAll = button("Select all that match", () => {
		allMatching = true;
		render();
	}, "quiet");
	const bulk = el("div.bulk", { role: "region", label: "Selected runs", hidden: true }, bulkText, bulkAll,
		Object.entries(ACTIONS).map(([action, [word, , kind]]) => button(word, () => act(action), kind)),
		button("Clear", clearSelection, "quiet"));

	// --- filters

	const address = (changes) => runsUrl({ ...filters, ...paging, ...changes });
	const change = (changes) => navigate(address({ before: null, ...changes }));

	function showFilters() {
		period.value = ""; // the time itself stands in a chip
		sort.value = paging.sort ?? "newest";
		setState(errorsOnly, "pressed", filters.errors);
		const named = Object.entries(filters).filter(([name]) => name !== "status" && name !== "errors");
		fill(chips, named.map(([name, value]) => {
			const word = WORDS[name] ?? name.replace("metadata.", "");
			const shown = /since|until/.test(name) && Date.parse(value) ? time(value, "short") : value;
			return el("span.chip", el("span.clip", { title: value }, `${word}: `, shown),
				iconButton("close", `Remove filter ${word}: ${value}`, () => change({ [name]: null })));
		}));
	}

	async function searched(event) {
		event.preventDefault();
		const words = typed.value.trim();
		if (!words) return;
		if (/^[\w.-]+$/.test(words)) { // an id leads to its run
			const { runs } = await get("/runs", { text: words, view: "light", limit: 1 });
			if (runs[0]?.id === words) return navigate(runUrl(words));
		}
		typed.value = "";
		typed.blur();
		change(readSearch(words));
	}

	// --- rows

	function render() {
		table.set(rows);
		if (rows.length === 0) fill(table, nothingHere());
		show(older, nextCursor);
		setText(older, rows.length < PAGE_SIZE ? "Search further" : "Next page");
		show(newest, paging.before);
		const wholePage = rows.length > 0 && rows.every((run) => selected.has(run.id));
		all.checked = allMatching || wholePage;
		show(bulk, allMatching || selected.size > 0);
		setText(bulkText, allMatching ? "All that match the filters" : `${plural(selected.size, "run")} selected`);
		show(bulkAll, !allMatching && wholePage);
	}

	function nothingHere() {
		if (nextCursor) return empty("Nothing among those that were looked through", "There are more: search further below.");
		if (Object.keys(filters).length) return empty("No run matches", link("/studio/runs", "Show all runs"));
		return empty("No runs yet", "A run is here as soon as a program creates one: ", code('tide.enqueue("report")'),
			", or ", code("python tidebase.py demo"), ".");
	}

	// --- reading

	async function read() {
		const asked = address();
		const known = new Map(rows.map((run) => [run.id, run]));
		const answer = first ?? readPage(filters, paging, Object.fromEntries(rows.map((run) => [run.id, run.version])));
		first = null;
		const { ids, runs, nextCursor: next } = await answer;
		setMark(mark, "live");
		if (asked === shown && !runs.length && next === nextCursor && ids.join() === [...known.keys()].join()) return;
		for (const run of runs) known.set(run.id, run);
		if (!rows.length && runs.length > SCREENFUL) {
			table.set(runs.slice(0, SCREENFUL));
			await breathe(30); // they are painted
		}
		if (asked !== address()) return; // somebody chose other filters meanwhile
		rows = ids.map((id) => known.get(id)).filter(Boolean);
		[shown, nextCursor] = [asked, next];
		render();
		readCounts();
	}

	async function refresh() {
		try {
			if (shown) await read();
		} catch (error) {
			setMark(mark, error.status === 0 ? "stale" : "reconnecting");
			throw error;
		}
	}

	const readCounts = debounce(async () => {
		const { counts: found, total } = await get("/counts", { ...filters, status: null });
		const chosen = new Set(filters.status?.split(","));
		const entries = Object.entries({ All: total, ...found })
			.filter(([name, { count: many }]) => name === "All" || many > 0 || chosen.has(name));
		syncRows(counts, entries, ([name]) => name, ([name]) => button("", () => toggleStatus(name)),
			(node, [name, { count: many, more }]) => {
				setState(node, "pressed", name === "All" ? chosen.size === 0 : chosen.has(name));
				fill(node, name !== "All" && el(`span.status.is-${name}`, icon(name)), `${name} `,
					el("b", compactCount(many), more && "+"));
			});
		counts.append(errorsOnly);
	}, 60);

	function toggleStatus(name) {
		const chosen = new Set(filters.status?.split(","));
		if (!chosen.delete(name)) chosen.add(name);
		change({ status: name === "All" ? null : [...chosen].join(",") });
	}

	// --- selection

	function choose(ids, chosen) {
		allMatching = false;
		for (const id of ids) selected[chosen ? "add" : "delete"](id);
		render();
	}

	function clearSelection() {
		selected.clear();
		choose([]);
	}

	async function act(action) {
		const target = allMatching ? { filter: toQuery(filters).slice(1) } : { ids: [...selected] };
		if (!await runBulk(action, target)) return;
		clearSelection();
		refresh().catch(laterAgain);
	}

	async function onQuery(parameters) {
		[filters, paging] = readAddress(parameters);
		selected.clear();
		allMatching = false;
		showFilters();
		try {
			await read();
		} catch (error) {
			if (error.status !== 400) throw error;
			[rows, shown, nextCursor] = [[], null, null];
			render();
			setMark(mark, "not live");
			fill(table, fault(error));
		}
	}

	fill(main, heading("Runs", mark),
		el("search.stack", el("div.filters", el("form.grow", { onsubmit: searched }, search), period, sort),
			el("div.spread", counts, chips)),
		table, bulk, inRow(newest, older));
	await onQuery(query);
	every(refresh, REFRESH_MS, signal);
	return { onQuery, escape: () => (selected.size || allMatching) && (clearSelection(), true) };
}

/** "status:failed customer:42 timed out" -> filters; values with spaces stand in quotes, the rest is text. */
function readSearch(words) {
	const found = {};
	const text = words.replace(/([^\s:"]+):("([^"]*)"|\S+)/g, (_, word, value, quoted) => {
		const name = word === "class" ? "failureClass" : word;
		found[FILTERS.includes(name) ? name : `metadata.${name}`] = quoted ?? value;
		return "";
	}).replace(/\s+/g, " ").trim();
	return { ...found, text };
}

/** Resolves to whether it was begun. */
async function runBulk(action, target) {
	const [title, past, kind] = ACTIONS[action];
	const { count: many, more, sample, cursor: start } = await post("/bulk", { action, ...target, dryRun: true });
	if (many === 0) return toast(`None of them can be ${past}.`);
	const words = `${title} ${count(many, more)} ${many === 1 ? "run" : "runs"}`;
	const asked = await ask(`${words}?`, [
		el("div.card", plainTable(sample.map((run) => [runStatus(run), run.workflowName, shortCode(run.id)]))),
		many > sample.length && muted(`and ${count(many - sample.length)} more`),
		action === "cancel" && field("Reason", input("reason")),
		action === "delete" && el("p", "Their steps, events and state go with them. This cannot be undone."),
	], words, kind && "Keep them");
	if (!asked) return false;

	const results = el("div.stack");
	const summary = el("strong", { role: "status" });
	let open = true;
	const tally = { true: 0, false: 0 };
	dialog(words, [summary, results]).closed.then(() => { open = false; });
	const order = { action, ...target, cursor: start, reason: asked.reason || undefined, actor: "studio" };
	try {
		while (order.cursor !== null && open) { // closing the report stops it
			const batch = await post("/bulk", order);
			for (const { ok } of batch.results) tally[ok] += 1;
			setText(summary, `${count(tally.true)} ${past}${tally.false ? `, ${count(tally.false)} refused` : ""}.`);
			results.append(plainTable(batch.results.map(({ id, ok, code: why, error }) =>
				[ok ? status("completed", past) : status("failed", why), link(runUrl(id), code(id)), muted(error)])));
			order.cursor = batch.cursor;
		}
	} catch (error) {
		setText(summary, `${summary.textContent} Stopped: ${error.message}.`);
	}
	return true;
}

// --- a run in a line

/** Ids of one hour begin alike. */
const shortCode = (id) => el("code", { title: id }, id.length > 20 ? `…${id.slice(-8)}` : id);

export function errorLine(error) {
	if (typeof error !== "object" || !error) return error ? String(error) : "";
	const line = [error.name, error.message].filter((part) => typeof part === "string" && part).join(": ");
	return error.message?.length === MOST_OF_ERROR ? line.replace(/\s+\S*$/, " …") : line;
}

/** The parts of the server's line: "waits for signal {b:signal}, until {at:until}". */
const PARTS = {
	b: strong, n: (value) => value, ago: (value) => time(value), at: (value) => time(value, "short"),
	for: (value) => time(value, "since"),
	ids: (list) => list.map((id, index) => [index > 0 && ", ", el("a", { href: runUrl(id) }, shortCode(id))]),
};

/** Null when it completed. */
export function outcome({ whyDetail, status, error, failureClass, cancelActor, cancelReason }) {
	if (whyDetail) {
		return [...whyDetail.line.matchAll(/\{(\w+):(\w+)\}|[^{]+/g)].map(([text, kind, name]) =>
			(kind ? PARTS[kind](whyDetail[name]) : text));
	}
	if (status === "failed") {
		return [el("span.error-text", errorLine(error) || "failed"), failureClass && [" ", tag(failureClass)]];
	}
	if (status !== "cancelled") return null;
	return ["cancelled", cancelActor && ` by ${cancelActor}`, cancelReason && `: ${cancelReason}`];
}

export const shownStatus = (run) => (run.stalled ? "stalled" : run.status);
export const runStatus = (run) => status(shownStatus(run));

export const attemptWords = ({ attempt, maxAttempts }) => (maxAttempts > 1 ? `${attempt} of ${maxAttempts}` : attempt);

export const runDuration = (run) => (run.completedAt ? duration(run.durationMs ?? 0)
	: run.status === "running" ? time(run.createdAt, "since") : dash());
