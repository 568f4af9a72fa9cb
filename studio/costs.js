// Costs: the ledger by day, workflow and model; a chart, the numbers beside it, and CSV.

import { get, getText } from "./api.js";
import { button, card, code, compactCount, count, el, empty, facts, fill, icon, meters, money, plainTable, select, skeleton, strong } from "./dom.js";
import { download } from "./payload.js";
import { setQuery } from "./router.js";

const DAY_MS = 864e5;
const HEADS = { day: "Day", workflow: "Workflow", model: "Model" };

export async function open({ main, query }) {
	const by = select("By", [["day", "By day"], ["workflow", "By workflow"], ["model", "By model"]], load);
	const days = select("Period", [["7", "Last 7 days"], ["30", "Last 30 days"], ["90", "Last 90 days"], ["365", "Last year"]], load);
	const box = el("div.stack", skeleton(8));
	by.value = query.get("by") ?? "day";
	days.value = query.get("days") ?? "30";
	const today = () => Math.floor(Date.now() / DAY_MS);
	const asked = () => ({ by: by.value, since: new Date((today() - days.value + 1) * DAY_MS).toISOString() });
	const csv = () => download(() => getText("/usage", { ...asked(), format: "csv" }, { accept: "text/csv" }), `tidebase-costs-by-${by.value}.csv`, "text/csv");
	fill(main, el("header.spread", el("h1", "Costs"), el("div.filters", by, days, button([icon("download"), "CSV"], csv))), box);

	async function load() {
		setQuery({ by: by.value, days: days.value });
		const kind = by.value;
		const { groups } = await get("/usage", asked());
		if (groups.length === 0) return fill(box, el("div.card", empty("Nothing was recorded in this time", "Usage is what workflows record: ", code("run.usage.record(model=…, cost_usd=…)"), ".")));
		const rows = groups.map((group) => ({ ...group, name: String(group[kind] ?? group.key ?? "not named").slice(0, 200), cost: Number(group.costUsd ?? 0) }));
		if (kind === "day") rows.sort((a, b) => (a.name < b.name ? 1 : -1));
		else rows.sort((a, b) => b.cost - a.cost);
		const sum = (name) => rows.reduce((all, row) => all + Number(row[name] ?? 0), 0);
		fill(box, facts([["Cost", strong(money(sum("cost")))], ["Tokens in", compactCount(sum("inputTokens"))], ["Tokens out", compactCount(sum("outputTokens"))], ["Entries", count(sum("entries"))]]),
			el("div.split", kind === "day" ? card("Cost by day", el("small", "days in UTC"), dayChart(rows, today(), Number(days.value), Math.min(720, box.clientWidth - 24))) : meters(`Cost by ${kind}`, rows.slice(0, 40).map((row) => [row.name, row.cost])),
				el("div.card", plainTable(rows.map((row) => [row.name, el("td.num", count(row.runs ?? 0)), el("td.num", compactCount(row.totalTokens ?? 0)),
					el("td.num", { title: row.costUsd }, money(row.cost))]), [HEADS[kind], ...["Runs", "Tokens", "Cost"].map((word) => el("div.num", word))]))));
	}
	await load();
}

function dayChart(rows, today, days, width) {
	const [height, left, bottom] = [260, 52, 22];
	const byDay = new Map(rows.map((row) => [row.name.slice(0, 10), row]));
	const most = Math.max(...rows.map((row) => row.cost)) || 1;
	const size = 10 ** Math.floor(Math.log10(most / 3));
	const step = [1, 2, 5, 10].map((factor) => factor * size).find((one) => one >= most / 3);
	const lines = Array.from({ length: Math.ceil(most / step - 1e-9) + 1 }, (_, index) => index * step);
	const room = (width - left) / days;
	const y = (value) => 8 + (height - bottom - 8) * (1 - value / lines.at(-1));
	const every = Math.ceil(days / Math.floor(width / 85));
	return el("svg.chart", { viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": "Cost; the numbers stand in the table" }, lines.map((value) => [el("line", { x1: left, x2: width, y1: y(value), y2: y(value) }), el("text", { x: left - 8, y: y(value) + 4, "text-anchor": "end" }, money(value))]),
		Array.from({ length: days }, (_, index) => {
			const day = new Date((today - days + 1 + index) * DAY_MS);
			const row = byDay.get(day.toISOString().slice(0, 10));
			const tall = row ? Math.max(1.5, height - bottom - y(row.cost)) : 0;
			const x = left + index * room;
			return [
				row?.cost > 0 && el("rect.bar-chart", { x: x + room * 0.14, width: room * 0.72, y: height - bottom - tall, height: tall, rx: Math.min(2, room * 0.2) }, el("title", `${row.name}: ${money(row.cost)}, ${count(row.runs ?? 0)} runs`)),
				(days - 1 - index) % every === 0 && el("text", { x: x + room / 2, y: height - 5, "text-anchor": index > days - 2 ? "end" : "middle" }, day.toLocaleDateString("en-GB", { day: "numeric", month: "short", timeZone: "UTC" })),
			];
		}));
}
