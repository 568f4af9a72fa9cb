// Costs: the ledger by day, workflow and model; a chart, the numbers beside it, and CSV.

import { get, getText } from "./api.js";
import { button, card, code, compactCount, count, el, empty, facts, fill, heading, icon, loading, meters, money,
	number, plainTable, select, strong } from "./dom.js";
import { download } from "./payload.js";
import { setQuery } from "./router.js";

const DAY_MS = 864e5;
const HEADS = { day: "Day", workflow: "Workflow", model: "Model" };
const PERIODS = [["7", "Last 7 days"], ["30", "Last 30 days"], ["90", "Last 90 days"], ["365", "Last year"]];

export async function open({ main, query }) {
	const by = select("By", Object.keys(HEADS).map((name) => [name, `By ${name}`]), read);
	const days = select("Period", PERIODS, read);
	by.value = query.get("by") ?? "day";
	days.value = query.get("days") ?? "30";
	const today = () => Math.floor(Date.now() / DAY_MS);
	const asked = () => ({ by: by.value, since: new Date((today() - days.value + 1) * DAY_MS).toISOString() });
	const csv = () => download(() => getText("/usage", { ...asked(), format: "csv" }, { accept: "text/csv" }),
		`tidebase-costs-by-${by.value}.csv`, "text/csv");
	const box = loading(load, 8);
	fill(main, heading("Costs", el("div.filters", by, days, button([icon("download"), "CSV"], csv))), box);

	function read() {
		setQuery({ by: by.value, days: days.value });
		box.again();
	}

	async function load() {
		const kind = by.value;
		const { groups } = await get("/usage", asked());
		if (kind !== by.value) return;
		if (groups.length === 0) {
			return fill(box, el("div.card", empty("Nothing was recorded in this time",
				"Usage is what workflows record: ", code("run.usage.record(model=…, cost_usd=…)"), ".")));
		}
		const rows = groups.map((group) => ({ ...group, name: (group[kind] ?? "not named").slice(0, 200),
			cost: Number(group.costUsd) }));
		rows.sort((one, other) => (kind === "day" ? other.name.localeCompare(one.name) : other.cost - one.cost));
		const sum = (name) => rows.reduce((all, row) => all + Number(row[name]), 0);
		fill(box,
			facts([["Cost", strong(money(sum("cost")))], ["Tokens in", compactCount(sum("inputTokens"))],
				["Tokens out", compactCount(sum("outputTokens"))], ["Entries", count(sum("entries"))]]),
			el("div.split", kind === "day" ? card("Cost by day", el("small", "days in UTC"),
				dayChart(rows, today(), Number(days.value), Math.min(720, box.clientWidth - 24)))
				: meters(`Cost by ${kind}`, rows.slice(0, 40).map((row) => [row.name, row.cost])),
			el("div.card", plainTable(rows.map((row) => [row.name, number(count(row.runs)),
				number(compactCount(row.totalTokens)), el("td.num", { title: row.costUsd }, money(row.cost))]),
			[HEADS[kind], ...["Runs", "Tokens", "Cost"].map((word) => el("div.num", word))]))));
	}
}

function dayChart(rows, today, days, width) {
	const [height, left, bottom] = [260, 52, 22];
	const byDay = new Map(rows.map((row) => [row.name, row]));
	const most = Math.max(...rows.map((row) => row.cost)) || 1;
	const size = 10 ** Math.floor(Math.log10(most / 3));
	const step = [1, 2, 5, 10].map((factor) => factor * size).find((one) => one >= most / 3);
	const lines = Array.from({ length: Math.ceil(most / step - 1e-9) + 1 }, (_, index) => index * step);
	const room = (width - left) / days;
	const base = height - bottom;
	const top = (value) => 8 + (base - 8) * (1 - value / lines.at(-1));
	const labelled = Math.ceil(days / Math.floor(width / 85)); // every so many days

	function bar(index) {
		const day = new Date((today - days + 1 + index) * DAY_MS);
		const row = byDay.get(day.toISOString().slice(0, 10));
		const x = left + index * room;
		const tall = row ? Math.max(1.5, base - top(row.cost)) : 0;
		const word = day.toLocaleDateString("en-GB", { day: "numeric", month: "short", timeZone: "UTC" });
		return [
			row?.cost > 0 && el("rect.bar-chart", { x: x + room * 0.14, width: room * 0.72, y: base - tall, height: tall },
				el("title", `${row.name}: ${money(row.cost)}, ${count(row.runs)} runs`)),
			(days - 1 - index) % labelled === 0 && el("text",
				{ x: x + room / 2, y: height - 5, "text-anchor": index > days - 2 ? "end" : "middle" }, word),
		];
	}

	return el("svg.chart", { viewBox: `0 0 ${width} ${height}`, role: "img",
		"aria-label": "Cost; the numbers stand in the table" },
	lines.map((value) => [el("line", { x1: left, x2: width, y1: top(value), y2: top(value) }),
		el("text", { x: left - 8, y: top(value) + 4, "text-anchor": "end" }, money(value))]),
	Array.from({ length: days }, (_, index) => bar(index)));
}
