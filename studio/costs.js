// Costs: the ledger by day, workflow and model; a chart, the numbers beside it, and CSV.

import { get, getText, query as toQuery } from "./api.js";
import { compactCount, count, el, empty, fill, icon, money, show, skeleton } from "./dom.js";
import { download } from "./payload.js";
import { setQuery, setTitle } from "./router.js";

const PERIODS = [["7", "7 days"], ["30", "30 days"], ["90", "90 days"], ["365", "A year"]];
const MOST_BARS = 12; // of workflows or models; the rest is one bar

export async function open({ main, query, signal }) {
  const period = el("select", { "aria-label": "Period", onchange: load }, PERIODS.map(([value, word]) => el("option", { value }, `Last ${word.toLowerCase()}`)));
  const by = el("select", { "aria-label": "By", onchange: load }, [["day", "By day"], ["workflow", "By workflow"], ["model", "By model"]].map(([value, word]) => el("option", { value }, word)));
  period.value = query.get("days") ?? "30";
  by.value = query.get("by") ?? "day";
  const total = el("div.facts");
  const chart = el("figure.card");
  const table = el("div.card.table-wrap");
  const both = el("div.split", chart, table);
  const nothing = el("div.card", { hidden: true });
  fill(main, el("header.spread", el("h1", "Costs"), el("div.filters", by, period,
    el("button", { onclick: csv }, icon("download"), "CSV"))), total, both, nothing);
  fill(chart, skeleton(6));

  const since = () => new Date(Math.floor(Date.now() / 864e5) * 864e5 - (Number(period.value) - 1) * 864e5).toISOString();
  const address = (format = null) => `/usage${toQuery({ by: by.value, since: since(), format })}`;

  function csv() {
    download(() => getText(address("csv"), { headers: { accept: "text/csv" } }), `tidebase-costs-by-${by.value}.csv`, "text/csv");
  }

  async function load() {
    setQuery({ by: by.value === "day" ? null : by.value, days: period.value === "30" ? null : period.value });
    const asked = address();
    const { groups } = await get(asked, { signal });
    if (asked !== address()) return;
    const rows = groups.map((group) => ({ ...group, key: group[by.value] ?? group.key, cost: Number(group.costUsd ?? 0) }));
    if (by.value === "day") rows.sort((a, b) => String(a.key).localeCompare(String(b.key)));
    else rows.sort((a, b) => b.cost - a.cost);
    show(both, rows.length > 0);
    show(nothing, rows.length === 0);
    fill(nothing, empty("Nothing was recorded in this time", "Usage is what workflows record: ", el("code", "run.usage.record(model=…, cost_usd=…)"), "."));
    const sum = (name) => rows.reduce((all, row) => all + Number(row[name] ?? 0), 0);
    fill(total, [["Cost", money(sum("cost"))], ["Tokens in", compactCount(sum("inputTokens"))], ["Tokens out", compactCount(sum("outputTokens"))], ["Entries", count(sum("entries"))]]
      .map(([word, text]) => el("div", el("dt.muted", word), el("dd", el("strong", text)))));
    if (rows.length === 0) return;
    const title = `Cost by ${by.value}`;
    fill(chart, el("header", el("h2", title), el("small", by.value === "day" ? "days in UTC" : "")),
      el("div.body", by.value === "day" ? dayChart(rows, Number(period.value)) : barChart(rows)));
    fill(table, el("table", el("thead", el("tr", el("th", { day: "Day", workflow: "Workflow", model: "Model" }[by.value]),
      ["Runs", "Tokens", "Cost"].map((word) => el("th.num", word)))),
    el("tbody", (by.value === "day" ? [...rows].reverse() : rows).map((row) => el("tr", el("td", nameOf(row)), el("td.num", count(row.runs ?? 0)),
      el("td.num", compactCount(row.totalTokens ?? 0)), el("td.num", { title: row.costUsd }, money(row.costUsd)))))));
  }

  setTitle("Costs");
  await load();
}

const nameOf = (row) => (row.key === null || row.key === "" ? "not named" : String(row.key).slice(0, 200));

/** Round steps for an axis from 0 to the largest value. */
function stepsTo(most) {
  const rough = most / 3 || 1;
  const size = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].map((factor) => factor * size).find((one) => one >= rough);
  const top = Math.ceil(most / step) * step || step;
  return { top, steps: Array.from({ length: Math.round(top / step) + 1 }, (_, index) => index * step) };
}

function dayChart(rows, days) {
  const [width, height, left, bottom] = [720, 260, 52, 22];
  const byDay = new Map(rows.map((row) => [String(row.key).slice(0, 10), row]));
  const today = Math.floor(Date.now() / 864e5);
  const all = Array.from({ length: days }, (_, index) => new Date((today - days + 1 + index) * 864e5).toISOString().slice(0, 10));
  const { top, steps } = stepsTo(Math.max(...rows.map((row) => row.cost)));
  const room = (width - left) / days;
  const y = (value) => 8 + (height - bottom - 8) * (1 - value / top);
  const every = Math.ceil(days / 8);
  return el("svg.chart", { viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": "Cost by day; the numbers stand in the table" },
    steps.map((value) => [el("line", { x1: left, x2: width, y1: y(value), y2: y(value) }), el("text", { x: left - 8, y: y(value) + 4, "text-anchor": "end" }, money(value))]),
    all.map((day, index) => {
      const row = byDay.get(day);
      const x = left + index * room;
      return [
        row && row.cost > 0 && el("rect.s0", { x: x + room * 0.14, width: room * 0.72, y: Math.min(y(row.cost), height - bottom - 1.5), height: Math.max(1.5, height - bottom - y(row.cost)), rx: Math.min(2, room * 0.2) },
          el("title", `${day}: ${money(row.costUsd)}, ${count(row.runs ?? 0)} runs`)),
        (days - 1 - index) % every === 0 && el("text", { x: x + room / 2, y: height - 5, "text-anchor": "middle" }, `${Number(day.slice(8))} ${MONTHS[Number(day.slice(5, 7)) - 1]}`),
      ];
    }));
}

const MONTHS = ["Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec"];

function barChart(rows) {
  const first = rows.slice(0, MOST_BARS);
  const rest = rows.slice(MOST_BARS);
  if (rest.length) first.push({ key: `${rest.length} others`, cost: rest.reduce((sum, row) => sum + row.cost, 0) });
  const [width, line, left] = [720, 30, 200];
  const most = Math.max(...first.map((row) => row.cost), 1e-12);
  return el("svg.chart", { viewBox: `0 0 ${width} ${first.length * line}`, role: "img", "aria-label": "Cost; the numbers stand in the table" },
    first.map((row, index) => {
      const long = (width - left - 80) * (row.cost / most);
      const name = nameOf(row);
      return [el("text", { x: left - 10, y: index * line + 19, "text-anchor": "end" }, name.length > 28 ? `${name.slice(0, 27)}…` : name, el("title", name)),
        el("rect.s0", { x: left, y: index * line + 6, width: Math.max(1.5, long), height: line - 12, rx: 2 }),
        el("text", { x: left + long + 8, y: index * line + 19 }, money(row.cost))];
    }));
}
