// Queues: how much waits and runs, the last hour minute by minute, caps, pause and resume.

import { attempt, canWrite, get, laterAgain, path, poll, put } from "./api.js";
import { ask, button, code, count, dash, duration, el, empty, field, fill, grid, link, plural, status, strong, toast } from "./dom.js";
import { runsUrl } from "./router.js";

export async function open({ main, signal }) {
	const hours = new Map(); // queue -> its chart, which is read less often than the counts
	const runsOf = (queue, name) => (queue[name] ? link(runsUrl({ queue: queue.name, status: name }), count(queue[name])) : dash("0"));
	const table = grid((queue) => queue.name, [
		["Queue", ({ name, config }) => el("div.row", el("a", { href: runsUrl({ queue: name }) }, strong(name)), config?.paused && status("paused"))],
		["Queued", (queue) => runsOf(queue, "queued"), "num"],
		["Running", (queue) => el("span", runsOf(queue, "running"), queue.config?.concurrency && ` of ${count(queue.config.concurrency)}`), "num"],
		["Waiting", (queue) => runsOf(queue, "waiting"), "num"],
		["Oldest ready", ({ oldestReadyMs }) => (oldestReadyMs ? duration(oldestReadyMs) : dash()), "num"],
		["Last hour", ({ name }) => hours.get(name)],
		["Caps", ({ config }) => [config?.concurrency && `${count(config.concurrency)} at once`, config?.ratePerMinute && `${count(config.ratePerMinute)} a minute`, config?.invokeUrl && "push"]
			.filter(Boolean).join(", ") || dash("none")],
		["", (queue) => canWrite() && el("div.row", button(queue.config?.paused ? "Resume" : "Pause", () => pause(queue)), button("Edit caps", () => edit(queue), "quiet")), "buttons"],
	], empty("No queues yet", "A queue is there as soon as something is put on it: ", code('tide.enqueue("report", queue="default")'), "."));
	fill(main, el("h1", "Queues"), table.element);

	async function change({ name }, changes) {
		const done = await attempt(() => put(path`/queues/${name}/config`, changes));
		await load();
		return done;
	}

	async function pause(queue) {
		const paused = !queue.config?.paused;
		if (await change(queue, { paused })) toast(paused ? `${queue.name} is paused: it gives out no runs; those that run go on.` : `${queue.name} gives out runs again.`);
	}

	async function edit(queue) {
		const input = (name, type) => el("input", { name, type, min: 1, value: queue.config?.[name] ?? "" });
		const values = await ask(`Caps of ${queue.name}`, el("div.fields", field("Runs at once", input("concurrency", "number"), "empty: no cap"),
			field("Claims a minute", input("ratePerMinute", "number"), "empty: no cap"),
			el("div.all", field("Push to", input("invokeUrl", "url"), "your app's address, which gets a webhook for each ready run; empty: workers ask"))), "Save");
		if (values) await change(queue, { concurrency: Number(values.concurrency) || null, ratePerMinute: Number(values.ratePerMinute) || null, invokeUrl: values.invokeUrl || null });
	}

	async function load() {
		const { queues } = await get("/queues");
		for (const { name } of queues) {
			if (hours.has(name)) continue;
			const chart = el("div");
			hours.set(name, chart);
			poll(async () => fill(chart, spark((await get(path`/queues/${name}/minutes`)).minutes)), 30_000, signal).catch(laterAgain);
		}
		table.set(queues);
	}
	await poll(load, 3000, signal);
}

/** Claims as bars upwards and failures as bars downwards, a minute each. */
function spark(minutes) {
	const sum = (name) => minutes.reduce((all, minute) => all + minute[name], 0);
	const most = Math.max(1, ...minutes.map((minute) => Math.max(minute.claims, minute.failures)));
	const text = `${plural(sum("claims"), "claim")} and ${plural(sum("failures"), "failure")} in the last hour, at most ${count(most)} in a minute`;
	if (sum("claims") + sum("failures") === 0) return dash("quiet");
	const bar = (kind, index, value, room) => {
		const height = Math.max(1, (room * value) / most);
		return value > 0 && el(`rect.${kind}`, { x: index * 2, width: 1.5, y: kind === "ok" ? 16 - height : 17, height });
	};
	return el("svg.spark", { viewBox: "0 0 120 24", role: "img", "aria-label": text, preserveAspectRatio: "none" }, el("title", text), el("line", { x1: 0, x2: 120, y1: 16.5, y2: 16.5 }),
		minutes.map((minute, index) => [bar("ok", index, minute.claims, 15), bar("bad", index, minute.failures, 7)]));
}
