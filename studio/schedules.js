// Schedules: when they fire next, on and off, run now; and a form that shows the next five fires as one types.

import { canWrite, getText, path, poll, post, put, remove } from "./api.js";
import { bodyOf, jsonInput } from "./decide.js";
import { ask, attempt, button, code, dash, debounce, el, empty, errorText, field, fill, grid, heading, input, link,
	muted, options, status, strong, time, toast, wholeInstant, zoneNote } from "./dom.js";
import { items, member } from "./json.js";
import { runsUrl } from "./router.js";

export async function open({ main, signal }) {
	const table = grid((schedule) => schedule.name, [
		["Schedule", ({ name }) => strong(name)],
		["On", ({ enabled }) => (enabled ? status("completed", "on") : status("paused", "off"))],
		["Cron", ({ cron, timezone }) => el("span", code(cron), muted(` ${timezone}`))],
		["Workflow", ({ name, workflowName }) => link(runsUrl({ "metadata.schedule": name }), workflowName)],
		["Queue", ({ queue }) => queue],
		["Next", ({ enabled, nextRunAt: at }) => (enabled && at ? [time(at, "short"), muted(" ", time(at))] : dash())],
		["Last", ({ lastEnqueuedAt }) => time(lastEnqueuedAt)],
		canWrite() && ["", (schedule) => el("div.row", button("Run now", () => act(() => runNow(schedule))),
			button(schedule.enabled ? "Disable" : "Enable", () => act(() => toggle(schedule))),
			button("Edit", () => edit(schedule), "quiet"), button("Delete", () => forget(schedule), "quiet.danger")), "buttons"],
	], empty("No schedules", "A schedule enqueues a run whenever its cron expression says, once,"
		+ " however many servers there are."));
	fill(main, heading("Schedules", el("div.row", zoneNote(),
		canWrite() && button("New schedule", () => edit(null), "primary"))), table.element);

	async function act(action) {
		await attempt(action);
		await load();
	}

	async function runNow({ name }) {
		const { run } = await post(path`/schedules/${name}/run`);
		toast(`Enqueued as ${run.id}.`);
	}

	/** Its input goes back as the text that came. */
	const toggle = ({ name, cron, timezone, workflowName, queue, maxAttempts, enabled, inputText }) =>
		put(path`/schedules/${name}`,
			bodyOf({ cron, timezone, workflowName, queue, maxAttempts, enabled: !enabled }, { input: inputText }));

	async function forget({ name }) {
		const sure = await ask(`Delete ${name}?`, el("p", "It fires no more. Runs that it enqueued stay."), "Delete",
			{ kind: "danger", otherwise: "Keep it" });
		if (sure) await act(() => remove(path`/schedules/${name}`));
	}

	async function edit(schedule) {
		const values = await askSchedule(schedule);
		if (!values) return;
		const { name, input: payload, maxAttempts, ...fields } = values;
		await act(() => put(path`/schedules/${name}`, bodyOf({ ...fields, maxAttempts: Number(maxAttempts),
			enabled: schedule?.enabled ?? true }, { input: payload })));
	}

	async function load() {
		const schedules = items(member(await getText("/schedules"), "schedules"));
		table.set(schedules.map((text) => ({ ...JSON.parse(text), inputText: member(text, "input") })));
	}
	await poll(load, 5000, signal);
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
	return ask(schedule ? `Schedule ${schedule.name}` : "New schedule", el("div.fields",
		field("Name", of("name", "", { maxlength: 512, readonly: Boolean(schedule) })),
		field("Workflow", of("workflowName", "")), field("Cron", cron, "minute hour day month weekday"),
		field("Time zone", zone),
		el("section.all.payload", el("header", el("h3", "Next fires")), el("div.dialog-body", fires)),
		field("Queue", of("queue", "default")), field("Attempts", of("maxAttempts", 3, { type: "number", min: 1 })),
		el("div.all", field("Input", jsonInput("input", { value: schedule?.inputText ?? "{}" }))),
		el("datalist", { id: "zones" }, options(zones.map((name) => [name])))), "Save");
}

const FIRE = { weekday: "short", day: "numeric", month: "short", hour: "2-digit", minute: "2-digit",
	timeZoneName: "short" };

/** A fire in the schedule's own zone, and how long it is until then. */
const fire = (at, timeZone) => el("li", { title: wholeInstant(at) },
	new Date(at).toLocaleString("en-GB", { timeZone, ...FIRE }), muted(" ", time(at)));
