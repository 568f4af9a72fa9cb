// The waterfall: a run's steps, gates, waits and children over time. Timeline turns events and rows into spans, and
// keeps what it worked out for each row: one more event costs the same in a run of a thousand steps.

import { button, duration, el, fill, icon, iconButton, muted, now, once, plural, row as inRow, searchInput, setState,
	setText, show, virtualRows, wholeInstant } from "./dom.js";

const ms = (iso) => (iso ? Date.parse(iso) : null);

const WORDS = { completed: "completed", running: "running", failed: "failed", cut: "cut off", held: "held",
	gap: "nobody at work", waiting: "waiting", queued: "in the queue", replayed: "replayed", manual_review: "no outcome",
	cancelled: "ended with the run", now: "now" };
const BUSY = new Set(["completed", "running", "failed", "cut", "manual_review", "held", "cancelled"]);
const STATUS_AFTER = { started: "running", completed: "completed", failed: "failed", manual_review: "manual_review" };
const STATUS_AFTER_REVIEW = { retry: "failed_retryable", fail: "failed" };
const kindOf = (status) => status.replace("_retryable", "");
const IDLE_AFTER = { created: "queued", enqueued: "queued", retried: "queued", released: "queued", requeued: "queued",
	resumed: "queued", waiting: "waiting", stalled: "gap" };
const ENDS = new Set(["completed", "failed", "cancelled"]);

/** A row's spans {kind, from, to, n, owner}: `to` is null while one lasts; attempts have a number, waits have none. */
export const attemptsOf = (row) => row.spans.filter((span) => span.n);
const wait = (row, kind, from, to = null) => row.spans.push({ kind, from, to });
const closeWaits = (row, at) => row.spans.forEach((span) => { if (!span.n) span.to ??= at; });

/** An attempt of a row, made when there is none. A step may be recorded at its end: the earliest instant counts. */
function attemptOf(row, n, from) {
	let attempt = row.spans.find((span) => span.n === n);
	if (!attempt) {
		row.spans.push(attempt = { n, kind: "running", from, to: null });
		row.spans.sort((one, other) => one.n - other.n);
	}
	attempt.from = Math.min(attempt.from, from);
	return attempt;
}

export class Timeline {
	constructor(leaseMs, runId) {
		// heardAt: when the run was last seen at work
		Object.assign(this, { leaseMs, runId, rows: new Map(), order: null, heardAt: 0 });
		this.run = this.row("run", "run", "run"); // its attempts are the claims
	}

	row(key, kind, name) {
		if (!this.rows.has(key)) {
			this.rows.set(key, { key, kind, name, spans: [], status: null, depth: 0 });
			this.order = null;
		}
		return Object.assign(this.rows.get(key), { bars: null });
	}

	setRun({ workflowName, status, stalled, createdAt, updatedAt, completedAt, whyDetail }) {
		const { kind, until, attempt = 1 } = whyDetail ?? {};
		const due = kind === "retry" || kind === "scheduled" ? ms(until) : null; // when the next attempt may begin
		Object.assign(this, { created: ms(createdAt), ended: ms(completedAt), due });
		Object.assign(this.row("run"), { name: workflowName, status: stalled ? "stalled" : status });
		if (due) {
			Object.assign(this.row("next", "wait", `attempt ${attempt}`), { status: "queued", due, spans: [] });
			wait(this.row("next"), "queued", ms(updatedAt), due);
		} else if (this.rows.delete("next")) this.order = null;
	}

	/** The last attempt's exact times, and what events do not carry. */
	setStep(step) {
		const row = this.row(step.id, "step", step.name);
		const from = ms(step.startedAt ?? step.createdAt);
		// A checkpoint that a fork began with is older than the fork.
		const copied = step.copied || (step.status === "completed" && from < this.created);
		Object.assign(row, { step, status: step.status, copied });
		if (copied) return;
		const attempt = attemptOf(row, step.attempt, from);
		// One that was reviewed ended when a person decided; events tell when its worker was cut off.
		if (step.status === "running" || step.status === "manual_review" || step.reviewed) return;
		const to = ms(step.completedAt) ?? attempt.to ?? ms(step.updatedAt);
		Object.assign(attempt, { to, kind: kindOf(step.status) });
	}

	setGate({ id, name, status, createdAt, resolvedAt }) {
		const row = this.row(id, "gate", name);
		Object.assign(row, { status: status === "pending" ? "waiting" : status, spans: [] });
		wait(row, "waiting", ms(createdAt), ms(resolvedAt));
	}

	setChild({ id, name, workflowName, parentRunId, depth, status, createdAt, startedAt, completedAt }) {
		const [from, to] = [ms(startedAt), ms(completedAt)];
		const row = this.row(id, "child", name ?? workflowName);
		Object.assign(row, { parent: parentRunId, depth, status, spans: [] });
		wait(row, "queued", ms(createdAt), from ?? to);
		if (from) row.spans.push({ n: 1, kind: status, from, to });
	}

	apply(event) {
		const at = ms(event.createdAt);
		const [subject, verb] = event.type.split(".");
		if (subject === "run") this.applyToRun(verb, event.attempt, event.payload ?? {}, at);
		else if (subject === "step" && event.stepId) this.applyToStep(verb, event, at);
		if (/^(run|step|state|usage)$/.test(subject)) this.heardAt = at;
	}

	applyToRun(verb, attempt, payload, at) {
		const run = this.row("run");
		const last = attemptsOf(run).at(-1);
		const held = last?.to === null ? last : null;
		if (verb === "claimed" || verb === "started") {
			if (held?.owner === payload.leaseOwner && held) return; // begun by who claimed it
			if (held) this.release(held, at, "cut");
			closeWaits(run, at);
			const n = attempt ?? attemptsOf(run).length + 1;
			run.spans.push({ n, kind: "running", from: at, to: null, owner: payload.leaseOwner });
		} else if (IDLE_AFTER[verb] || ENDS.has(verb)) {
			const lost = verb === "stalled" || payload.reason === "lease_expired" || payload.error?.name === "LeaseExpired";
			if (held) {
				this.release(held, at, lost ? "cut" : ENDS.has(verb) ? verb : verb === "requeued" ? "failed" : "held");
			}
			for (const row of this.rows.values()) {
				if (row === run || (row.kind === "wait" && verb !== "waiting")) closeWaits(row, at);
			}
			if (IDLE_AFTER[verb]) wait(run, lost ? "gap" : IDLE_AFTER[verb], at);
			const { event: signal, until } = payload.for ?? {}; // gates have rows of their own, children theirs
			if (signal) wait(this.row(`signal:${signal}`, "wait", `signal ${signal}`), "waiting", at);
			else if (until) wait(this.row("sleep", "wait", "sleep"), "waiting", at);
		}
		for (const row of this.rows.values()) row.bars = null; // attempts of the run show in all rows
	}

	/** A worker that was cut off ended some time after it was last heard of. */
	release(held, at, kind) {
		const cut = kind === "cut";
		const to = cut ? this.heardAt = Math.max(this.heardAt, at - this.leaseMs) : at;
		Object.assign(held, { to, kind });
		if (cut) wait(this.run, "gap", to, at);
		for (const row of this.rows.values()) {
			for (const attempt of row.kind === "step" ? attemptsOf(row) : []) {
				if (attempt.to === null && attempt.from <= to) Object.assign(attempt, { to, kind: cut ? "cut" : "held" });
			}
		}
	}

	applyToStep(verb, event, at) {
		const row = this.row(event.stepId, "step", event.name);
		const status = STATUS_AFTER[verb];
		if (verb === "started") {
			const before = attemptsOf(row).find((one) => one.n === row.current);
			row.current = event.attempt ?? (row.current ?? 0) + 1;
			if (before?.to === null && before.n !== row.current) Object.assign(before, { to: at, kind: "cut" });
			attemptOf(row, row.current, at);
		} else if (status) { // these events name no attempt: they end the one that began last
			const attempt = attemptOf(row, row.current ?? 1, at);
			if (attempt.to === null) Object.assign(attempt, { to: at, kind: kindOf(status) });
		}
		const shown = status ?? (verb === "reviewed" && STATUS_AFTER_REVIEW[event.payload?.decision]);
		if (shown && !(at < ms(row.step?.updatedAt))) row.status = shown; // a row that was read after this event knows better
	}

	/** Its spans, what follows from them, and where its output was used again. */
	bars(row) {
		if (row.bars) return row.bars;
		const bars = row.copied ? [{ kind: "replayed", from: this.created, to: this.created }] : [];
		const add = (kind, from, to, more) => bars.push({ ...more, kind, from, to: to ?? this.ended });
		const attempts = attemptsOf(row);
		for (const span of row.spans) {
			const ended = span.kind === "running" && this.ended;
			if (span.n || span.to !== span.from) add(ended ? "cancelled" : span.kind, span.from, span.to, span);
			const next = attempts[attempts.indexOf(span) + 1];
			if (row.kind !== "step") continue;
			if (row.status === "manual_review" && !next) add("waiting", span.to ?? span.from, null);
			else if (span.kind === "cut") add("gap", span.to, next?.from);
		}
		if (row.kind === "run" && bars.length === 0) add(this.ended ? row.status : "queued", this.created, null);
		const done = row.kind === "step" && row.status === "completed" ? attempts.at(-1)?.to : null;
		if (done) for (const { from, n } of attemptsOf(this.run)) if (from >= done) add("replayed", from, from, { n });
		return row.bars = bars;
	}

	ordered() {
		const begin = (row) => row.spans[0]?.from ?? (row.copied ? 0 : Infinity);
		const compare = (one, other) => (one.step && other.step ? one.step.position - other.step.position
			: begin(one) - begin(other));
		return this.order ??= [...this.rows.values()].filter(({ kind, depth }) => kind !== "run" && depth <= 1).sort(compare);
	}

	childrenOf(id) {
		return [...this.rows.values()].filter((row) => row.kind === "child" && row.parent === id);
	}
}

// --- time on the screen

const FOLD_SHARE = 0.05; // of the width, for a folded stretch

/** Where instants are between 0 and 1; idle stretches are folded when they are long beside the rest. */
function makeScale(intervals, start, end) {
	const gaps = [];
	let busy = 0;
	let at = start;
	for (const [from, to] of intervals.sort((one, other) => one[0] - other[0])) {
		if (from > at) gaps.push({ from: at, to: from });
		busy += Math.max(0, to - Math.max(from, at));
		at = Math.max(at, to);
	}
	gaps.push({ from: at, to: end });
	const folds = busy ? gaps.filter(({ from, to }) => to - from > Math.max(300, busy * 0.3)) : [];
	const share = Math.min(FOLD_SHARE, 0.3 / folds.length);
	const open = folds.reduce((sum, { from, to }) => sum - (to - from), end - start) || 1; // what is not folded, in ms
	const place = (instant) => {
		let [passed, folded] = [instant - start, 0];
		for (const { from, to } of folds) {
			const part = Math.max(0, Math.min(1, (instant - from) / (to - from)));
			passed -= part * (to - from);
			folded += part;
		}
		return Math.max(0, Math.min(1, (passed / open) * (1 - share * folds.length) + folded * share));
	};
	return { folds, start, end, open, place };
}

const NICE = [1, 2, 5, 10, 20, 50, 100, 200, 500, 1e3, 2e3, 5e3, 1e4, 15e3, 3e4, 6e4, 12e4, 3e5, 6e5, 9e5, 18e5, 36e5,
	72e5, 216e5, 432e5, 864e5, 1728e5, 6048e5];

function ticksOf({ folds, start, end, open, place }, wanted, room) {
	const step = NICE.find((size) => open / size <= wanted) ?? NICE.at(-1);
	const ticks = [];
	for (const [index, { to }] of [...folds, { to: end }].entries()) { // from one fold to the next
		const [from, until] = [index ? folds[index - 1].to : start, folds[index]?.from ?? to];
		for (let n = Math.ceil((from - start) / step); start + n * step <= until; n += 1) {
			const left = place(start + n * step);
			const text = n === 0 ? "0" : duration(n * step);
			const last = ticks.at(-1);
			const covered = folds[index] && place(until) < left + room;
			const close = last && (left - last.left < 1.3 * room || text === last.text);
			if (!covered && !close && left <= 1 - room) ticks.push({ left, text });
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

/** A step is not at work when its worker, or the run, is gone. */
function statusOf(row) {
	const gone = row.kind === "step" && row.status === "running" && attemptsOf(row).at(-1)?.kind !== "running";
	return gone ? "stalled" : row.status ?? "pending";
}

/** onOpen(id) brings a child's timeline. */
export function makeWaterfall(timeline, { onSelect, onOpen, signal }) {
	const opened = new Map(); // children whose own rows are shown -> their Timeline
	let errorsOnly = false;
	let filter = "";
	let chosen = null;
	let drawing = null;
	let scale;
	let end;
	const onlyErrors = button("Errors only", () => {
		errorsOnly = !errorsOnly;
		setState(onlyErrors, "pressed", errorsOnly);
		draw();
	}, "", { "aria-pressed": "false", title: "Only steps that failed or were cut off" });
	const axis = el("div.track.axis");
	const table = el("table.waterfall", { label: "Steps over time" }, el("thead", el("tr", el("th.w-name", "Step"),
		el("th.w-time", "Duration"), el("th.w-track", el("span.offscreen", "Time"), axis))));
	const rows = virtualRows(table, 3, { keyOf: (row) => row.key, make: makeRow, update: updateRow }, signal);
	const nothing = el("p.empty");
	const legend = el("div.legend", { "aria-hidden": "true" });
	const tally = muted();
	const search = searchInput("Filter steps", "Filter steps by name", (text) => {
		filter = text.toLowerCase();
		draw();
	});
	const element = el("section.card", el("header", search, inRow(onlyErrors, tally)), el("div.clipped", table), nothing,
		el("div.body", legend));
	const observer = new ResizeObserver(schedule);
	observer.observe(table);
	signal.addEventListener("abort", () => observer.disconnect());

	function schedule() {
		drawing ??= setTimeout(() => {
			drawing = null;
			draw();
		}, 100);
	}

	/** Below a child that was unfolded stand its own steps and children. */
	function shownRows() {
		const fits = (row) => row.name.toLowerCase().includes(filter) && (!errorsOnly || isError(row));
		const list = [timeline.run];
		const addRow = (row) => {
			if (fits(row)) list.push(row);
			const own = opened.get(row.key);
			if (!own) return;
			list.push(...own.ordered().filter(fits).map((step) => Object.assign(step, { depth: row.depth + 1, owner: own })));
			timeline.childrenOf(row.key).forEach(addRow);
		};
		timeline.ordered().forEach(addRow);
		return list;
	}

	const barsOf = (row) => (row.owner ?? timeline).bars(row);

	function draw() {
		const list = shownRows();
		end = timeline.ended ?? now();
		const busyOf = (some) => some.flatMap(barsOf).filter(({ kind }) => BUSY.has(kind))
			.map(({ from, to }) => [from, Math.max(to ?? end, from + 1)]);
		const ofSteps = busyOf(list.slice(1));
		const busy = ofSteps.length ? ofSteps : busyOf([timeline.run]);
		if (timeline.due) busy.push([end, end]); // what is to come is folded apart from what was
		const last = busy.reduce((most, [, to]) => Math.max(most, to), Math.max(end, timeline.created + 1, timeline.due));
		scale = makeScale(busy, timeline.created, last);
		drawAxis();
		rows.set(list);
		show(nothing, list.length === 1);
		setText(nothing, timeline.rows.size > 1 ? "No step matches."
			: timeline.ended ? "It ended without a step." : "No step has begun yet.");
		setText(tally, plural(list.filter((row) => row.kind === "step").length, "step"));
		const kinds = new Set([timeline.ended ? "" : "now", ...list.flatMap(barsOf).map(({ kind }) => kind)]);
		const shown = Object.keys(WORDS).filter((kind) => kinds.has(kind));
		once(legend, shown, () =>
			fill(legend, shown.map((kind) => el("span", el("i", el(`span.bar.is-${kind}`)), WORDS[kind]))));
	}

	function drawAxis() {
		const width = axis.clientWidth || 600;
		const { folds, place } = scale;
		const ticks = ticksOf(scale, Math.max(2, Math.floor(width / 70)), 46 / width);
		const present = place(end);
		once(axis, [width, folds, ticks, present], () => fill(axis,
			ticks.map(({ left, text }) => el("span.tick", placed(left, left), text)),
			folds.map(({ from, to }) => el("span.fold",
				{ title: `nothing for ${duration(to - from)}`, ...placed(place(from), place(to)) }, "⋯")),
			!timeline.ended && el("span.bar.is-now", placed(present, present))));
	}

	function makeRow(row) {
		const [name, symbol, took, track] = [el("span"), el("span"), el("td.w-time"), el("div.track")];
		const press = button([symbol, name], () => onSelect(node.row), "step-name", { "data-row": "" });
		const unfold = row.kind === "child" && iconButton("chevron", `Steps of ${row.name}`, async () => {
			const id = node.row.key;
			if (!opened.delete(id)) opened.set(id, await onOpen(id));
			setState(unfold, "expanded", opened.has(id));
			draw();
		}, { "aria-expanded": "false" });
		const node = el("tr", { onclick: (event) => !event.target.closest("button") && onSelect(node.row) },
			el("td.w-name", unfold ? el("div.unfolds", unfold, press) : press), took, el("td.w-track", track));
		return Object.assign(node, { name, symbol, took, track, press });
	}

	function updateRow(node, row) {
		const { name, symbol, took, track, press } = Object.assign(node, { row });
		setText(name, row.name);
		if (row.depth > 1) node.firstChild.style.paddingLeft = `${1.2 * row.depth - 0.6}rem`;
		node.classList.toggle("chosen", chosen === row.key);
		const status = statusOf(row);
		once(symbol, status, () => {
			press.title = row.name;
			press.setAttribute("aria-label", `${row.name}: ${status.replace("_", " ")}`);
			symbol.className = `status is-${status}`;
			fill(symbol, icon(ICON_OF[row.kind] ?? status));
		});
		const bars = barsOf(row);
		const { folds, place } = scale;
		const places = bars.map((bar) => [bar.kind, place(bar.from), place(bar.to ?? end)]);
		setText(took, timeOf(row, bars));
		once(track, [folds.length, places], () => fill(track,
			folds.map(({ from, to }) => el("span.fold", placed(place(from), place(to)))),
			places.map(([kind, left, right], index) => {
				const open = kind === "running" && bars[index].to === null ? ".is-open" : "";
				return Object.assign(el(`span.bar.is-${kind}${open}`, placed(left, right)),
					{ describe: () => wordsOf(bars[index]) });
			})));
	}

	const wordsOf = ({ kind, n, owner, from, to }) => `${WORDS[kind] ?? kind}${n ? `, attempt ${n}` : ""}`
		+ `${owner ? ` by ${owner}` : ""}, ${duration((to ?? end) - from)}\nfrom ${wholeInstant(from)}`;

	function timeOf(row, bars) {
		if (row.kind === "run") return duration(end - timeline.created);
		if (row.due) return `in ${duration(row.due - end)}`;
		const busy = bars.filter(({ kind }) => BUSY.has(kind));
		const list = busy.length ? busy : bars.filter(({ kind }) => kind === "waiting");
		if (list.length === 0) return row.copied ? "copied" : "–";
		return duration(list.reduce((sum, { from, to }) => sum + (to ?? end) - from, 0));
	}

	function choose(key) {
		chosen = key;
		draw();
	}

	return { element, draw, schedule, choose, reveal: rows.reveal };
}
