// The pages of whoever operates the system: queues, workers, schedules and costs.

import { canWrite, get, getText, laterAgain, navigate, path, poll, post, put, query as toQuery, remove, runsUrl, runUrl
	} from "./api.js";
import { ask, button, card, code, compactCount, count, dash, debounce, duration, el, empty, errorText, facts,
	field, fields, fill, grid, heading, icon, idText, input, link, meter, money, muted, now, number, options,
	plainTable, plural, row, select, setText, status, strong, tag, time, toast, wholeInstant } from "./dom.js";
import { bodyOf, download, items, jsonInput, member } from "./payload.js";

// --- queues

export async function queuesPage({ main, signal }) {
	const hours = new Map(); // queue -> its chart, which is read less often than the counts
	const runsOf = (queue, name) =>
		(queue[name] ? link(runsUrl({ queue: queue.name, status: name }), count(queue[name])) : dash("0"));
	const table = grid("name", [
		["Queue", ({ name, config }) =>
			row(el("a", { href: runsUrl({ queue: name }) }, strong(name)), config?.paused && status("paused"))],
		["Queued", (queue) => runsOf(queue, "queued"), "num"],
		["Running", (queue) => el("span", runsOf(queue, "running"),
			queue.config?.concurrency && ` of ${count(queue.config.concurrency)}`), "num"],
		["Waiting", (queue) => runsOf(queue, "waiting"), "num"],
		["Oldest ready", ({ oldestReadyMs }) => (oldestReadyMs ? duration(oldestReadyMs) : dash()), "num"],
		["Last hour", ({ name }) => hours.get(name)],
		["Caps", ({ config }) => [config?.concurrency && `${count(config.concurrency)} at once`,
			config?.ratePerMinute && `${count(config.ratePerMinute)} a minute`, config?.invokeUrl && "push"]
			.filter(Boolean).join(", ") || dash("none")],
		canWrite() && ["", (queue) => row(
			button(queue.config?.paused ? "Resume" : "Pause", () => change(queue, { paused: !queue.config?.paused }), "",
				{ title: "A paused queue gives out no runs; those that run go on" }),
			button("Edit", () => edit(queue), "quiet")), "buttons"],
	], empty("No queues yet", "A queue is there as soon as something is put on it: ",
		code('tide.enqueue("report", queue="default")'), "."));

	async function change({ name }, changes) {
		await put(path`/queues/${name}/config`, changes);
		await load();
	}

	async function edit(queue) {
		const before = queue.config ?? {};
		const of = (name, type) => input(name, { type, min: 1, value: before[name] ?? "" });
		const values = await ask(`Queue ${queue.name}`, fields(
			field("Runs at once", of("concurrency", "number"), "empty: no cap"),
			field("Claims a minute", of("ratePerMinute", "number"), "empty: no cap"),
			el("div.all", field("Push to", of("invokeUrl", "url"), "The app's address, to which ready runs are offered."
				+ " Empty: workers ask for them."))), "Save");
		if (!values) return;
		const cap = (name) => Number(values[name]) || null;
		const push = values.invokeUrl || null;
		await change(queue, { concurrency: cap("concurrency"), ratePerMinute: cap("ratePerMinute"),
			invokeUrl: push === before.invokeUrl ? undefined : push }); // it is shown without its password
	}

	async function load() {
		const { queues } = await get("/queues");
		for (const { name } of queues) {
			if (hours.has(name)) continue;
			const chart = el("div");
			hours.set(name, chart);
			poll(async () => fill(chart, spark((await get(path`/queues/${name}/minutes`)).minutes)), 30_000, signal)
				.catch(laterAgain);
		}
		table.set(queues);
	}
	await poll(load, 3000, signal);
	fill(main, heading("Queues"), table);
}

/** A minute each: its claims, and before them its failures. */
function spark(minutes) {
	const most = Math.max(1, ...minutes.flatMap(({ claims, failures }) => [claims, failures]));
	const [claims, failures] = ["claims", "failures"].map((name) => minutes.reduce((sum, minute) => sum + minute[name], 0));
	if (claims + failures === 0) return dash("quiet");
	const text = `${plural(claims, "claim")} and ${plural(failures, "failure")} in the last hour,`
		+ ` at most ${count(most)} in a minute`;
	const bars = (kind, name) => minutes.map(({ [name]: value }, index) => {
		const height = Math.max(1, (24 * value) / most);
		return value > 0 && el(`rect.${kind}`, { x: index * 2, width: 1.5, y: 24 - height, height });
	});
	return el("svg.spark", { viewBox: "0 0 120 24", role: "img", label: text, preserveAspectRatio: "none" },
		el("title", text), bars("is-running", "claims"), bars("is-failed", "failures"));
}

// --- workers

const QUIET_MS = 60_000;

export async function workersPage({ main, signal }) {
	const tally = muted();
	const table = grid("key", [
		["Worker", ({ id, quiet }) => row(
			el(`span.mark.is-${quiet ? "reconnecting" : "live"}`, { title: quiet ? "not heard of for a minute" : "there" }),
			id ? idText(id) : muted("a client without a name"))],
		["Queues", ({ queues }) => (queues?.length ? row(queues.map(tag)) : dash())],
		["Workflows", ({ workflows }) => workflows?.join(", ") ?? muted("all")],
		["Runs", ({ running, runs }) => el("div", running === 0 && dash("none"),
			runs.map((run) => el("div", link(runUrl(run.id), run.workflowName), muted(" heard ", time(run.heartbeatAt)))),
			running > runs.length && `and ${count(running - runs.length)} more`)],
		["Since", ({ since }) => time(since)],
		["Last heard", "heardAt"],
	], empty("No worker has asked for work", "A worker is your own process: ", code('tide.work(queues=["default"])'),
		". Queued runs wait until one asks."));

	await poll(async () => {
		const { workers } = await get("/workers");
		setText(tally, workers.length ? plural(workers.length, "worker") : "");
		table.set(workers.map((worker) => {
			const heardAt = worker.lastHeardAt ?? worker.lastAskedAt;
			return { ...worker, key: worker.id ?? worker.queues.join(), heardAt, quiet: now() - new Date(heardAt) > QUIET_MS };
		}));
	}, 2500, signal);
	fill(main, heading("Workers", tally), table);
}

// --- schedules

export async function schedulesPage({ main, signal }) {
	const table = grid("name", [
		["Schedule", ({ name }) => strong(name)],
		["On", ({ enabled }) => (enabled ? status("completed", "on") : status("paused", "off"))],
		["Cron", ({ cron, timezone }) => el("span", code(cron), muted(` ${timezone}`))],
		["Workflow", ({ name, workflowName }) => link(runsUrl({ "metadata.schedule": name }), workflowName)],
		["Queue", "queue"],
		["Next", ({ enabled, nextRunAt: at }) => (enabled && at ? el("span", time(at, "short"), " ", muted(time(at)))
			: dash())],
		["Last", "lastEnqueuedAt"],
		canWrite() && ["", (schedule) => row(button("Run now", () => act(() => runNow(schedule))),
			button(schedule.enabled ? "Disable" : "Enable", () => act(() => save({ ...schedule, enabled: !schedule.enabled }))),
			button("Edit", () => edit(schedule), "quiet"), button("Delete", () => forget(schedule), "quiet.danger")), "buttons"],
	], empty("No schedules", "A schedule enqueues a run whenever its cron expression says, once."));

	async function act(action) {
		await action();
		await load();
	}

	async function runNow({ name }) {
		const { run } = await post(path`/schedules/${name}/run`);
		toast(`Enqueued as ${run.id}.`);
	}

	/** Its input goes as the text that came, or was typed. */
	const save = ({ name, cron, timezone, workflowName, queue, maxAttempts, enabled = true, inputText }) =>
		put(path`/schedules/${name}`, bodyOf({ cron, timezone, workflowName, queue, maxAttempts: Number(maxAttempts),
			enabled }, { input: inputText }));

	async function forget({ name }) {
		const sure = await ask(`Delete ${name}?`, el("p", "It fires no more. Runs that it enqueued stay."), "Delete",
			"Keep it");
		if (sure) await act(() => remove(path`/schedules/${name}`));
	}

	async function edit(schedule) {
		const values = await askSchedule(schedule);
		if (values) await act(() => save({ ...schedule, ...values }));
	}

	async function load() {
		const list = items(member(await getText("/schedules"), "schedules"));
		table.set(list.map((text) => ({ ...JSON.parse(text), inputText: member(text, "input") })));
	}
	await poll(load, 5000, signal);
	fill(main, heading("Schedules", canWrite() && button("New schedule", () => edit(null), "primary")), table);
}

function askSchedule(schedule) {
	const of = (name, otherwise, attributes = {}) =>
		input(name, { required: true, value: schedule?.[name] ?? otherwise, ...attributes });
	const fires = el("div", { role: "status" });
	const zones = Intl.supportedValuesOf?.("timeZone") ?? ["UTC"];
	const here = Intl.DateTimeFormat().resolvedOptions().timeZone;
	const cron = of("cron", "0 9 * * 1-5", { oninput: () => preview(), autocomplete: "off" });
	const zone = of("timezone", here, { oninput: () => preview(), list: "zones" });
	const preview = debounce(async () => {
		const asked = { cron: cron.value, timezone: zone.value };
		let fault = "";
		let shown;
		try {
			const { next } = await post("/schedules/preview", asked);
			shown = next.length ? el("ol.fires", next.map((at) => fire(at, asked.timezone))) : muted("It never fires.");
		} catch (error) {
			fault = error.message;
			shown = errorText(fault);
		}
		if (asked.cron !== cron.value || asked.timezone !== zone.value) return; // typed on meanwhile
		cron.setCustomValidity(fault);
		fill(fires, shown);
	}, 120);
	preview();
	return ask(schedule ? `Schedule ${schedule.name}` : "New schedule", fields(
		field("Name", of("name", "", { maxlength: 512, readonly: Boolean(schedule) })),
		field("Workflow", of("workflowName", "")), field("Cron", cron, "minute hour day month weekday"),
		field("Time zone", zone),
		el("section.all.payload", el("header", el("h3", "Next fires")), el("div.body", fires)),
		field("Queue", of("queue", "default")), field("Attempts", of("maxAttempts", 3, { type: "number", min: 1 })),
		el("div.all", field("Input", jsonInput("inputText", { value: schedule?.inputText ?? "{}" }))),
		el("datalist", { id: "zones" }, options(zones.map((name) => [name])))), "Save");
}

const fire = (at, timeZone) => el("li", { title: wholeInstant(at) }, new Date(at).toLocaleString("en-GB", { timeZone,
	weekday: "short", day: "numeric", month: "short", year: "numeric", hour: "2-digit", minute: "2-digit",
	timeZoneName: "short" }), muted(" ", time(at)));

// --- costs

const DAY_MS = 864e5;
const HEADS = { day: "Day", workflow: "Workflow", model: "Model" };
const PERIODS = [["7", "Last 7 days"], ["30", "Last 30 days"], ["90", "Last 90 days"], ["365", "Last year"]];

export async function costsPage({ main, query }) {
	const change = () => navigate(`/studio/costs${toQuery({ by: by.value, days: days.value })}`);
	const by = select("By", Object.keys(HEADS).map((name) => [name, `By ${name}`]), change);
	const days = select("Period", PERIODS, change);
	const today = () => Math.floor(Date.now() / DAY_MS);
	const asked = () => ({ by: by.value, since: new Date((today() - days.value + 1) * DAY_MS).toISOString() });
	const csv = () => download(() => getText("/usage", { ...asked(), format: "csv" }, { accept: "text/csv" }),
		`tidebase-costs-by-${by.value}.csv`, "text/csv");
	const box = el("div.stack");
	fill(main, heading("Costs", el("div.filters", by, days, button([icon("download"), "CSV"], csv))), box);

	async function onQuery(parameters) {
		for (const [choice, name, otherwise] of [[by, "by", "day"], [days, "days", "30"]]) {
			choice.value = parameters.get(name) ?? otherwise;
			if (!choice.value) choice.value = otherwise;
		}
		const kind = by.value;
		const { groups } = await get("/usage", asked());
		if (kind !== by.value) return;
		if (groups.length === 0) {
			return fill(box, el("div.card", empty("Nothing was recorded in this time",
				"Workflows record it: ", code("run.usage.record(model=…, cost_usd=…)"), ".")));
		}
		const rows = groups.map((group) => ({ ...group, name: (group[kind] ?? "not named").slice(0, 200),
			cost: Number(group.costUsd) }));
		const byDay = kind === "day";
		rows.sort((one, other) => (byDay ? other.name.localeCompare(one.name) : other.cost - one.cost));
		const sum = (name) => rows.reduce((all, row) => all + Number(row[name]), 0);
		const table = el("div.card", plainTable(rows.map((row) => [
			el("td", row.name, !byDay && meter(row.cost / rows[0].cost)), number(count(row.runs)),
			number(compactCount(row.totalTokens)), el("td.num", { title: row.costUsd }, money(row.cost))]),
		[HEADS[kind], ...["Runs", "Tokens", "Cost"].map((word) => el("div.num", word))]));
		const chart = el("div");
		fill(box,
			facts({ Cost: strong(money(sum("cost"))), "Tokens in": compactCount(sum("inputTokens")),
				"Tokens out": compactCount(sum("outputTokens")), Entries: count(sum("entries")) }),
			byDay ? el("div.split", card("Cost by day", el("small", "days in UTC"), chart), table) : table);
		if (byDay) fill(chart, dayChart(rows, today(), Number(days.value), chart.clientWidth));
	}
	await onQuery(query);
	return { onQuery };
}

function dayChart(rows, today, days, width) {
	const [height, base, ceiling] = [260, 238, 8];
	const most = Math.max(...rows.map((row) => row.cost)) || 1;
	const lines = [0, most / 2, most];
	const left = 12 + 7 * Math.max(...lines.map((value) => money(value).length));
	const room = (width - left) / days;
	const across = (day) => left + (day - today + days - 1) * room;
	const top = (value) => base - (base - ceiling) * (value / most);
	const every = Math.ceil(days / Math.floor(width / 85)); // so many days have a label
	return el("svg.chart", { viewBox: `0 0 ${width} ${height}`, role: "img",
		label: "Cost; the numbers stand in the table" },
	lines.map((value) => [el("line", { x1: left, x2: width, y1: top(value), y2: top(value) }),
		el("text", { x: left - 8, y: top(value) + 4, "text-anchor": "end" }, money(value))]),
	rows.filter((row) => row.cost > 0).map(({ name, cost, runs }) => {
		const tall = Math.max(1.5, base - top(cost));
		return el("rect.is-running", { x: across(Date.parse(name) / DAY_MS) + room * 0.14, width: room * 0.72,
			y: base - tall, height: tall }, el("title", `${name}: ${money(cost)}, ${plural(runs, "run")}`));
	}),
	Array.from({ length: Math.ceil(days / every) }, (_, index) => el("text",
		{ x: across(today - index * every) + room / 2, y: height - 5, "text-anchor": index ? "middle" : "end" },
		new Date((today - index * every) * DAY_MS).toUTCString().slice(5, 11))));
}
