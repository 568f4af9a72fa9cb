// Queues: how much waits and runs, the last hour minute by minute, caps, pause and resume.

import { canWrite, get, laterAgain, path, poll, put } from "./api.js";
import { ask, attempt, button, code, count, dash, duration, el, empty, field, fill, grid, heading, input, link, plural,
	status, strong, toast } from "./dom.js";
import { runsUrl } from "./router.js";

export async function open({ main, signal }) {
	const hours = new Map(); // queue -> its chart, which is read less often than the counts
	const runsOf = (queue, name) =>
		(queue[name] ? link(runsUrl({ queue: queue.name, status: name }), count(queue[name])) : dash("0"));
	const table = grid((queue) => queue.name, [
		["Queue", ({ name, config }) =>
			el("div.row", el("a", { href: runsUrl({ queue: name }) }, strong(name)), config?.paused && status("paused"))],
		["Queued", (queue) => runsOf(queue, "queued"), "num"],
		["Running", (queue) => el("span", runsOf(queue, "running"),
			queue.config?.concurrency && ` of ${count(queue.config.concurrency)}`), "num"],
		["Waiting", (queue) => runsOf(queue, "waiting"), "num"],
		["Oldest ready", ({ oldestReadyMs }) => (oldestReadyMs ? duration(oldestReadyMs) : dash()), "num"],
		["Last hour", ({ name }) => hours.get(name)],
		["Caps", ({ config }) => [config?.concurrency && `${count(config.concurrency)} at once`,
			config?.ratePerMinute && `${count(config.ratePerMinute)} a minute`, config?.invokeUrl && "push"]
			.filter(Boolean).join(", ") || dash("none")],
		canWrite() && ["", (queue) => el("div.row", button(queue.config?.paused ? "Resume" : "Pause", () => pause(queue)),
			button("Edit caps", () => edit(queue), "quiet")), "buttons"],
	], empty("No queues yet", "A queue is there as soon as something is put on it: ",
		code('tide.enqueue("report", queue="default")'), "."));
	fill(main, heading("Queues"), table.element);

	async function change({ name }, changes) {
		const done = await attempt(() => put(path`/queues/${name}/config`, changes));
		await load();
		return done;
	}

	async function pause(queue) {
		const paused = !queue.config?.paused;
		if (!await change(queue, { paused })) return;
		toast(paused ? `${queue.name} is paused: it gives out no runs; those that run go on.`
			: `${queue.name} gives out runs again.`);
	}

	async function edit(queue) {
		const of = (name) => input(name, { type: "number", min: 1, value: queue.config?.[name] ?? "" });
		const values = await ask(`Caps of ${queue.name}`, el("div.fields",
			field("Runs at once", of("concurrency"), "empty: no cap"),
			field("Claims a minute", of("ratePerMinute"), "empty: no cap")), "Save");
		if (!values) return;
		const cap = (name) => Number(values[name]) || null;
		await change(queue, { concurrency: cap("concurrency"), ratePerMinute: cap("ratePerMinute") });
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
}

/** Claims as bars upwards and failures as bars downwards, a minute each. */
function spark(minutes) {
	const [claims, failures] = ["claims", "failures"].map((name) => minutes.map((minute) => minute[name]));
	const most = Math.max(1, ...claims, ...failures);
	const sum = (numbers) => numbers.reduce((all, one) => all + one, 0);
	if (sum(claims) + sum(failures) === 0) return dash("quiet");
	const text = `${plural(sum(claims), "claim")} and ${plural(sum(failures), "failure")} in the last hour,`
		+ ` at most ${count(most)} in a minute`;
	const bars = (kind, numbers, room, top) => numbers.map((value, index) => {
		const height = Math.max(1, (room * value) / most);
		return value > 0 && el(`rect.${kind}`, { x: index * 2, width: 1.5, y: top(height), height });
	});
	return el("svg.spark", { viewBox: "0 0 120 24", role: "img", "aria-label": text, preserveAspectRatio: "none" },
		el("title", text), el("line", { x1: 0, x2: 120, y1: 16.5, y2: 16.5 }),
		bars("ok", claims, 15, (height) => 16 - height), bars("bad", failures, 7, () => 17));
}
