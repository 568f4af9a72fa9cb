// The waterfall: what a run did, over time. A Timeline is made anew for each drawing, from all that is known of the run;
// makeAxis says where an instant stands on the screen, and makeWaterfall draws.

import { button, duration, el, fill, icon, iconButton, muted, now, once, plural, row as inRow, searchInput, setState,
	setText, show, virtualRows, wholeInstant } from "./dom.js";

const ms = (iso) => (iso ? Date.parse(iso) : null);

// The kinds of spans, as the legend calls them.
export const WORDS = { completed: "completed", running: "running", failed: "failed", cut: "cut off", held: "held",
	cancelled: "ended with the run", gap: "nobody at work", waiting: "waiting", queued: "in the queue",
	replayed: "replayed", now: "now" };
const isBusy = ({ kind }) => !/^(gap|waiting|queued|pending|replayed)$/.test(kind);

// What a run does after an event, until somebody holds it again; null when it has ended.
const AFTER = { created: "queued", enqueued: "queued", retried: "queued", released: "queued", requeued: "queued",
	resumed: "queued", waiting: "waiting", stalled: "gap", completed: null, failed: null, cancelled: null };
// A step's status after an event, or after the decision of a review.
const STEP_STATUS = { started: "running", completed: "completed", failed: "failed", manual_review: "manual_review",
	retry: "failed_retryable", fail: "failed" };
const kindOf = (status) => ({ failed_retryable: "failed", manual_review: "cut" })[status] ?? status;

/** Of a row's spans {kind, from, to, n, owner} (ms, `to` is null while one lasts), those of work: only they have a number. */
export const attemptsOf = (row) => row.spans.filter(({ n }) => n);

/** Rows {key, name, kind, status, spans}: `list` begins with the run, the others follow in the order of their begin. */
export class Timeline {
	rows = new Map();
	heardAt = 0; // when the run was last seen at work

	/** Of the tree of children, those right below the run become rows. */
	constructor({ id, light, events, steps, gates, leaseMs }, tree) {
		Object.assign(this, { leaseMs, created: ms(light.createdAt), ended: ms(light.completedAt) });
		this.run = this.row("run", id, light.workflowName, light.stalled ? "stalled" : light.status);
		for (const event of events) this.apply(event);
		if (!this.run.spans.length) this.span(this.run, this.ended ? light.status : "queued", this.created);
		for (const step of steps.values()) this.addStep(step);
		for (const row of this.rows.values()) if (row.kind === "step") this.completeStep(row);
		for (const gate of gates) {
			const row = this.row("gate", gate.id, gate.name, gate.status.replace("pending", "waiting"));
			this.span(row, "waiting", ms(gate.createdAt), ms(gate.resolvedAt));
		}
		for (const child of tree) if (child.parentRunId === id) this.addChild(child);
		const { kind, until, attempt = 1 } = light.whyDetail ?? {};
		if (kind === "retry" || kind === "scheduled") {
			const next = this.row("wait", `${id} attempt ${attempt}`, `attempt ${attempt}`, "queued");
			this.span(next, "queued", ms(light.updatedAt), this.due = next.due = ms(until));
		}
		const begin = ({ spans }) => spans[0]?.from ?? this.created;
		const [itself, ...others] = this.rows.values();
		this.list = [itself, ...others.sort((one, other) => begin(one) - begin(other))];
		for (const row of this.list) {
			row.runId = id;
			if (row.kind === "wait" && row.spans.at(-1).to < now()) row.status = "completed";
		}
	}

	row(kind, key, name, status = "pending") {
		if (!this.rows.has(key)) this.rows.set(key, { key, name, kind, status, spans: [] });
		return this.rows.get(key);
	}

	span(row, kind, from, to = null, more = {}) {
		const span = { kind, from, to, ...more };
		row.spans.push(span);
		return span;
	}

	apply({ type, at, seq, name, stepId, attempt, payload }) {
		const [subject, verb] = type.split(".");
		if (subject === "run") this.applyToRun(verb, at, attempt, payload ?? {});
		if (subject === "step" && stepId) {
			const row = Object.assign(this.row("step", stepId, name), { seq });
			this.applyToStep(row, verb, at, attempt, payload ?? {});
		}
		if (/^(run|step|state|usage)$/.test(subject)) this.heardAt = at;
	}

	/** Each of these events ends the run's last span, and most begin the next. */
	applyToRun(verb, at, attempt, { leaseOwner: owner, reason, error, for: awaited }) {
		const claimed = verb === "claimed" || verb === "started";
		if (!claimed && !(verb in AFTER)) return;
		const last = this.run.spans.at(-1) ?? {};
		const held = last.n && last.to === null;
		if (claimed && held && last.owner === owner) return; // begun by who claimed it
		last.to = at;
		if (held) last.kind = verb === "requeued" ? "failed" : AFTER[verb] === null ? verb : "held";
		if (held && (claimed || verb === "stalled" || reason === "lease_expired" || error?.name === "LeaseExpired")) {
			last.kind = "cut";
			last.to = Math.max(this.heardAt, at - this.leaseMs); // it was gone some time before
			this.span(this.run, "gap", last.to, at);
		}
		if (claimed) this.span(this.run, "running", at, null, { n: attempt ?? attemptsOf(this.run).length + 1, owner });
		else if (AFTER[verb]) this.span(this.run, AFTER[verb], at);
		// Gates and children have rows of their own.
		const wait = awaited?.event ? `signal ${awaited.event}` : awaited?.until && "sleep";
		if (wait) this.row("wait", `${this.run.key} ${wait}`, wait, "waiting").spans.push(this.run.spans.at(-1));
	}

	/** Only the beginning names its attempt: the other events end the last one. */
	applyToStep(row, verb, at, attempt, { decision, retryable }) {
		const status = STEP_STATUS[verb === "reviewed" ? decision : retryable ? "retry" : verb];
		const last = row.spans.at(-1);
		if (verb === "started") this.span(row, "running", at, null, { n: attempt ?? row.spans.length + 1, begun: at });
		else if (status && last?.to === null) Object.assign(last, { kind: kindOf(status), to: at });
		row.status = status ?? row.status;
	}

	/** The record of a step, as it was read: newer events go beyond it. */
	addStep(step) {
		const { copied, status, attempt: n } = step;
		const row = Object.assign(this.row("step", step.id, step.name), { copied });
		if (!(row.seq > step.seq)) row.status = status;
		if (copied) return;
		const from = ms(step.startedAt ?? step.createdAt);
		const attempt = row.spans.find((span) => span.n === n) ?? this.span(row, "running", from, null, { n });
		attempt.from = Math.min(attempt.from, from); // it may be recorded at its end
		if (status === "running" || status === "manual_review" || step.reviewed) return;
		Object.assign(attempt, { kind: kindOf(status), to: ms(step.completedAt) ?? attempt.to ?? ms(step.updatedAt) });
	}

	/** What follows from a step's attempts, and where its output was used again. */
	completeStep(row) {
		const { created, ended, run } = this;
		const attempts = row.spans;
		const last = attempts.at(-1);
		row.spans = row.copied ? [{ kind: "replayed", from: created, to: created }] : [];
		attempts.forEach((attempt, index) => {
			const next = attempts[index + 1];
			// It ends with its worker's hold on the run, even when a person decides later how it ended.
			const claim = attemptsOf(run).findLast(({ from }) => from <= attempt.begun);
			const end = Math.min(claim?.to ?? Infinity, next?.from ?? Infinity, ended ?? Infinity);
			if (end < (attempt.to ?? Infinity)) {
				Object.assign(attempt, { kind: claim?.kind === "cut" || end === next?.from ? "cut" : "cancelled", to: end });
			}
			row.spans.push(Object.assign(attempt, { owner: claim?.owner }));
			const kind = row.status === "manual_review" && !next ? "waiting" : attempt.kind === "cut" && "gap";
			if (kind) this.span(row, kind, attempt.to ?? attempt.from, next?.from ?? ended);
		});
		if (row.status === "running" && last?.kind !== "running") row.status = "stalled"; // its worker or its run is gone
		if (row.status !== "completed" || !last) return;
		for (const { from, owner } of attemptsOf(run)) if (from >= last.to) this.span(row, "replayed", from, from, { owner });
	}

	addChild({ id, name, workflowName, status, createdAt, startedAt, completedAt }) {
		const [from, to] = [ms(startedAt), ms(completedAt)];
		const row = this.row("child", id, name ?? workflowName, status);
		this.span(row, "queued", ms(createdAt), from ?? to);
		if (from) this.span(row, status, from, to, { n: 1 });
	}
}

// --- time on the screen

const FOLD_WIDTH = 0.05; // of the axis

/** An axis from 0 to 1, in stretches {from, to, left, width, folded}: idle ones that are long beside the rest are folded. */
function makeAxis(busySpans, start, end) {
	const idle = [];
	let busy = 0;
	let at = start;
	for (const [from, to] of busySpans.sort((one, other) => one[0] - other[0])) {
		if (from > at) idle.push([at, from]);
		busy += Math.max(0, to - Math.max(from, at));
		at = Math.max(at, to);
	}
	const folds = [...idle, [at, end]].filter(([from, to]) => busy && to - from > Math.max(300, busy * 0.3));
	const foldWidth = Math.min(FOLD_WIDTH, 0.3 / folds.length);
	const open = folds.reduce((sum, [from, to]) => sum - (to - from), end - start) || 1; // in ms
	const stretches = [];
	let left = 0;
	const add = (from, to, width, folded) => {
		stretches.push({ from, to, left, width, folded });
		left += width;
	};
	at = start;
	for (const [from, to] of [...folds, [end, null]]) {
		add(at, from, ((from - at) / open) * (1 - foldWidth * folds.length), false);
		if (to) add(from, to, foldWidth, true);
		at = to;
	}
	const place = (instant) => {
		const here = stretches.find(({ to }) => instant <= to) ?? stretches.at(-1);
		const part = (instant - here.from) / (here.to - here.from || 1);
		return Math.max(0, Math.min(1, here.left + part * here.width));
	};
	return { start, open, stretches, folds: stretches.filter(({ folded }) => folded), place };
}

const NICE = [1, 2, 5, 10, 20, 50, 100, 200, 500, 1e3, 2e3, 5e3, 1e4, 15e3, 3e4, 6e4, 12e4, 3e5, 6e5, 9e5, 18e5, 36e5,
	72e5, 216e5, 432e5, 864e5, 1728e5, 6048e5]; // ms from a tick to the next

/** About so many ticks as wanted, on what is not folded, with `room` for the text of each. */
function ticksOf({ start, open, stretches, place }, wanted, room) {
	const step = NICE.find((size) => open / size <= wanted) ?? NICE.at(-1);
	const ticks = [];
	for (const { from, to, left: begin, width } of stretches.filter(({ folded }) => !folded)) {
		for (let n = Math.ceil((from - start) / step); start + n * step <= to; n += 1) {
			const left = place(start + n * step);
			const text = n === 0 ? "0" : duration(n * step);
			const last = ticks.at(-1);
			const close = last && (left - last.left < 1.3 * room || text === last.text);
			if (!close && left + room <= begin + width + 1e-9) ticks.push({ left, text });
		}
	}
	return ticks;
}

// --- the view

const ICON_OF = { gate: "approvals", wait: "clock", child: "runs" };
const percent = (part) => `${(100 * part).toFixed(3)}%`;
const placed = (from, to) => ({ style: { left: percent(from), width: percent(to - from) } });

const isError = (row) => /^failed|manual_review/.test(row.status)
	|| attemptsOf(row).some(({ kind }) => kind === "failed" || kind === "cut");

/** Of a LiveRun. onSelect(row) opens what a row stands for. */
export function makeWaterfall(run, onSelect) {
	let all = []; // the rows, also those that the filters hide
	let filter = "";
	let errorsOnly = false;
	let chosen = null;
	let drawing = null;
	let timeline;
	let axis;
	let end; // of what has happened
	const onlyErrors = button("Errors only", () => {
		errorsOnly = !errorsOnly;
		setState(onlyErrors, "pressed", errorsOnly);
		draw();
	}, "", { "aria-pressed": "false", title: "Only steps that failed or were cut off" });
	const search = searchInput("Filter steps", "Filter steps by name", (text) => {
		filter = text.toLowerCase();
		draw();
	});
	const ruler = el("div.track.axis");
	const table = el("table.waterfall", { label: "Steps over time" }, el("thead", el("tr", el("th.w-name", "Step"),
		el("th.w-time", "Duration"), el("th.w-track", el("span.offscreen", "Time"), ruler))));
	const rows = virtualRows(table, 3, { keyOf: ({ key }) => key, make: makeRow, update: updateRow }, run.signal);
	const [tally, nothing, legend] = [muted(), el("p.empty"), el("div.legend", { "aria-hidden": "true" })];
	const element = el("section.card", el("header", search, inRow(onlyErrors, tally)), el("div.clipped", table), nothing,
		el("div.body", legend));
	addEventListener("resize", schedule, { signal: run.signal });

	function schedule() { // events come in bursts
		drawing ??= setTimeout(() => {
			drawing = null;
			draw();
		}, 100);
	}

	/** Below a child that was unfolded stand its own rows. */
	const withUnfolded = (list, depth) => list.flatMap((row) => {
		const child = run.unfolded.get(row.key);
		const below = child ? new Timeline(child, run.tree).list.slice(1) : [];
		return [Object.assign(row, { depth }), ...withUnfolded(below, depth + 1)];
	});

	function draw() {
		timeline = new Timeline(run, run.tree);
		const { created, ended, due } = timeline;
		end = ended ?? now();
		all = withUnfolded(timeline.list, 0);
		const list = all.filter((row) => row.kind === "run"
			|| (row.name.toLowerCase().includes(filter) && (!errorsOnly || isError(row))));
		const busyOf = (some) => some.flatMap(({ spans }) => spans.filter(isBusy))
			.map(({ from, to }) => [from, Math.max(to ?? end, from + 1)]);
		const ofSteps = busyOf(list.slice(1));
		const busy = ofSteps.length ? ofSteps : busyOf([timeline.run]);
		if (due) busy.push([end, end]); // what is to come is folded apart from what was
		axis = makeAxis(busy, created, Math.max(end, created + 1, due ?? 0, ...busy.map(([, to]) => to)));
		drawRuler();
		rows.set(list);
		show(nothing, list.length === 1);
		setText(nothing, all.length > 1 ? "No step matches." : ended ? "It ended without a step." : "No step has begun yet.");
		setText(tally, plural(list.filter(({ kind }) => kind === "step").length, "step"));
		const kinds = new Set([!ended && "now", ...list.flatMap(({ spans }) => spans.map(({ kind }) => kind))]);
		const shown = Object.keys(WORDS).filter((kind) => kinds.has(kind));
		once(legend, shown, () =>
			fill(legend, shown.map((kind) => el("span", el("i", el(`span.bar.is-${kind}`)), WORDS[kind]))));
	}

	function drawRuler() {
		const width = ruler.clientWidth || 600;
		const ticks = ticksOf(axis, Math.max(2, Math.floor(width / 70)), 46 / width);
		const present = !timeline.ended && axis.place(end);
		once(ruler, [ticks, axis.folds, present], () => fill(ruler,
			ticks.map(({ left, text }) => el("span.tick", placed(left, left), text)),
			axis.folds.map(({ from, to, left, width: wide }) => el("span.fold",
				{ title: `nothing for ${duration(to - from)}`, ...placed(left, left + wide) }, "⋯")),
			present !== false && el("span.bar.is-now", placed(present, present))));
	}

	function makeRow(row) {
		const { key, kind, name, depth } = row;
		const [symbol, took, track] = [el("span"), el("td.w-time"), el("div.track")];
		const press = button([symbol, el("span", name)], () => onSelect(row), "step-name", { title: name, "data-row": "" });
		const unfold = kind === "child" && iconButton("chevron", `Steps of ${name}`, async () => {
			await run.unfold(key);
			draw();
		});
		const node = el("tr", { onclick: ({ target }) => target.closest("button") || onSelect(row) },
			el("td.w-name", { style: depth ? { paddingLeft: `${1.2 * depth + 0.6}rem` } : {} },
				unfold ? el("div.unfolds", unfold, press) : press), took, el("td.w-track", track));
		return Object.assign(node, { symbol, took, track, press, unfold });
	}

	function updateRow({ classList, symbol, took, track, press, unfold }, row) {
		const { key, kind, name, status, spans } = row;
		classList.toggle("chosen", chosen === key);
		if (unfold) setState(unfold, "expanded", run.unfolded.has(key));
		setText(took, timeOf(row));
		once(symbol, status, () => {
			press.setAttribute("aria-label", `${name}: ${status.replace("_", " ")}`);
			symbol.className = `status is-${status}`;
			fill(symbol, icon(ICON_OF[kind] ?? status));
		});
		const places = spans.map((span) => [span.kind, axis.place(span.from), axis.place(span.to ?? end), span.to === null]);
		once(track, [axis.folds.length, places], () => fill(track,
			axis.folds.map(({ left, width }) => el("span.fold", placed(left, left + width))),
			places.map(([is, from, to, lasts], index) => Object.assign(
				el(`span.bar.is-${is}${is === "running" && lasts ? ".is-open" : ""}`, placed(from, to)),
				{ describe: () => wordsOf(spans[index]) }))));
	}

	const wordsOf = ({ kind, n, owner, from, to }) => `${WORDS[kind] ?? kind}${n ? `, attempt ${n}` : ""}`
		+ `${owner ? ` by ${owner}` : ""}, ${duration((to ?? end) - from)}\nfrom ${wholeInstant(from)}`;

	function timeOf({ kind, due, spans, copied }) {
		if (kind === "run") return duration(end - timeline.created);
		if (due) return `in ${duration(due - end)}`;
		const busy = spans.filter(isBusy);
		const list = busy.length ? busy : spans.filter((span) => span.kind === "waiting");
		if (list.length === 0) return copied ? "copied" : "–";
		return duration(list.reduce((sum, { from, to }) => sum + (to ?? end) - from, 0));
	}

	const rowOf = (key) => all.find((row) => row.key === key);

	function choose(key) {
		chosen = key;
		draw();
		return rowOf(key);
	}

	return { element, draw, update: schedule, choose, rowOf, reveal: rows.reveal };
}
