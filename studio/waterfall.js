// The waterfall: a run's steps, gates, waits and children over time.
//
// Timeline turns events and rows into bars, one event at a time, and keeps what it worked out for each row: one more event
// costs the same in a run of a thousand steps. makeScale says where an instant is on the screen, idle stretches folded.
// Waterfall draws the rows that are on the screen.

import { button, duration, el, fill, icon, iconButton, muted, now, plural, searchInput, setText, show, wholeInstant } from "./dom.js";
import { VirtualRows } from "./virtual.js";

const ms = (iso) => (iso ? Date.parse(iso) : null);

/** What bars show, and the words of the legend. */
const WORDS = { completed: "completed", running: "running", failed: "failed", cut: "cut off", gap: "nobody at work", waiting: "waiting", queued: "in the queue", replayed: "replayed" };
const STATUS_OF_STEP = { started: "running", completed: "completed", failed: "failed", manual_review: "manual_review" };
const OUTCOME_OF = { failed_retryable: "failed", manual_review: "review" }; // else a step's status
const AFTER_REVIEW = { retry: "failed_retryable", fail: "failed" };
const outcomeOf = (status) => OUTCOME_OF[status] ?? status;
const IDLE_AFTER = { created: "queued", enqueued: "queued", retried: "queued", released: "queued", requeued: "queued", resumed: "queued", waiting: "waiting", stalled: "gap" };
const ENDS = new Set(["completed", "failed", "cancelled"]);
const closeWaits = (row, at) => row.waits.forEach((wait) => { wait.to ??= at; });

/** Rows with attempts and waits, {from, to, ...} with `to` null while they last. */
export class Timeline {
	constructor(leaseMs, runId = null) {
		Object.assign(this, { leaseMs, runId, rows: new Map(), order: null, seq: 0, heardAt: 0 }); // heardAt: when the run was last seen at work
		this.run = this.row("run", "run", "run"); // its attempts are the claims, its waits what it did between them
	}

	/** The row with this key; its bars are worked out again. */
	row(key, kind, name) {
		if (!this.rows.has(key)) {
			this.rows.set(key, { key, kind, name, attempts: [], waits: [], status: null, depth: 0 });
			this.order = null;
		}
		return Object.assign(this.rows.get(key), { bars: null });
	}

	setRun(run) {
		Object.assign(this, { created: ms(run.createdAt), ended: ms(run.completedAt) });
		Object.assign(this.row("run"), { name: run.workflowName, status: run.stalled ? "stalled" : run.status });
	}

	/** A step's row: the last attempt's exact times, and what events do not carry. */
	setStep(step) {
		const row = this.row(step.id, "step", step.name);
		const from = ms(step.startedAt ?? step.createdAt);
		// A checkpoint that a fork began with is older than the fork.
		Object.assign(row, { step, status: step.status, copied: step.copied || (step.status === "completed" && from < this.created) });
		if (row.copied) return;
		const attempt = attemptOf(row, step.attempt, from);
		if (step.status === "running" || step.status === "manual_review") return;
		Object.assign(attempt, { to: ms(step.completedAt) ?? attempt.to ?? ms(step.updatedAt), outcome: outcomeOf(step.status) });
	}

	setGate(gate) {
		Object.assign(this.row(gate.id, "gate", gate.name), { status: gate.status === "pending" ? "waiting" : gate.status, waits: [{ from: ms(gate.createdAt), to: ms(gate.resolvedAt), kind: "waiting" }] });
	}

	/** A run of the subtree. */
	setChild(child) {
		const [from, to] = [ms(child.startedAt), ms(child.completedAt)];
		Object.assign(this.row(child.id, "child", child.name ?? child.workflowName), { parent: child.parentRunId, depth: child.depth, status: child.status,
			attempts: from ? [{ n: 1, from, to, outcome: child.status }] : [], waits: [{ from: ms(child.createdAt), to: from ?? to, kind: "queued" }] });
	}

	apply(event) {
		if (event.seq <= this.seq) return;
		this.seq = event.seq;
		const at = ms(event.createdAt);
		const [subject, verb] = event.type.split(".");
		if (subject === "run") this.applyToRun(verb, event, event.payload ?? {}, at);
		else if (subject === "step" && event.stepId) this.applyToStep(verb, event, at);
		if (/^(run|step|state|usage)$/.test(subject)) this.heardAt = at;
	}

	applyToRun(verb, event, payload, at) {
		const run = this.row("run");
		const held = run.attempts.at(-1)?.to === null ? run.attempts.at(-1) : null;
		if (verb === "claimed" || verb === "started") {
			if (held?.owner === payload.leaseOwner && held) return; // begun by who claimed it
			if (held) this.release(held, at, "cut");
			closeWaits(run, at);
			run.attempts.push({ n: event.attempt ?? run.attempts.length + 1, from: at, to: null, outcome: "running", owner: payload.leaseOwner });
		} else if (IDLE_AFTER[verb] || ENDS.has(verb)) {
			const lost = verb === "stalled" || payload.reason === "lease_expired" || payload.error?.name === "LeaseExpired";
			if (held) this.release(held, at, lost ? "cut" : ENDS.has(verb) ? verb : verb === "requeued" ? "failed" : "held");
			for (const row of this.rows.values()) if (row === run || (row.kind === "wait" && verb !== "waiting")) closeWaits(row, at);
			if (IDLE_AFTER[verb]) run.waits.push({ from: at, to: null, kind: lost ? "gap" : IDLE_AFTER[verb] });
			const { event: signal, until } = payload.for ?? {}; // gates have rows of their own, children theirs
			if (signal || until) this.row(signal ? `signal:${signal}` : "sleep", "wait", signal ? `signal ${signal}` : "sleep").waits.push({ from: at, to: null, kind: "waiting" });
		}
		for (const row of this.rows.values()) row.bars = null; // attempts of the run show in all rows
	}

	/** A worker's time with the run is over. One that was cut off ended some time after it was last heard of. */
	release(held, at, outcome) {
		const cut = outcome === "cut";
		const to = cut ? this.heardAt = Math.max(this.heardAt, at - this.leaseMs) : at;
		Object.assign(held, { to, outcome });
		if (cut) this.run.waits.push({ from: to, to: at, kind: "gap" });
		for (const row of this.rows.values()) {
			for (const attempt of row.kind === "step" ? row.attempts : []) {
				if (attempt.to === null && attempt.from <= to) Object.assign(attempt, { to, outcome: cut ? "cut" : "held" });
			}
		}
	}

	applyToStep(verb, event, at) {
		const row = this.row(event.stepId, "step", event.name);
		const status = STATUS_OF_STEP[verb];
		if (verb === "started") {
			const before = row.attempts.find((one) => one.n === row.current);
			row.current = event.attempt ?? (row.current ?? 0) + 1;
			if (before?.to === null && before.n !== row.current) Object.assign(before, { to: at, outcome: "cut" });
			attemptOf(row, row.current, at);
		} else if (status) { // these events name no attempt: they end the one that began last
			const attempt = attemptOf(row, row.current ?? 1, at);
			if (attempt.to === null) Object.assign(attempt, { to: at, outcome: outcomeOf(status) });
		}
		const shown = status ?? (verb === "reviewed" && AFTER_REVIEW[event.payload?.decision]);
		if (shown && !(at < ms(row.step?.updatedAt))) row.status = shown; // a row that was read after this event knows better
	}

	/** A row's bars: {from, to (null: until now), kind, n, owner}. */
	bars(row) {
		return row.bars ??= this.makeBars(row);
	}

	makeBars(row) {
		const bars = row.copied ? [{ from: this.created, to: this.created, kind: "replayed" }] : [];
		const add = (from, to, kind, more) => bars.push({ from, to: to ?? this.ended, kind, ...more });
		for (const wait of row.waits) if (wait.to === null || wait.to > wait.from) add(wait.from, wait.to, wait.kind);
		row.attempts.forEach(({ n, owner, from, to, outcome }, index) => {
			const next = row.attempts[index + 1];
			add(from, to, outcome === "running" && this.ended ? "cancelled" : outcome, { n, owner });
			if (row.kind !== "step") return;
			if (row.status === "manual_review" && !next) add(to ?? from, null, "waiting");
			else if (outcome === "cut") add(to, next?.from, "gap");
		});
		if (row.kind === "run" && bars.length === 0) add(this.created, null, this.ended ? row.status : "queued");
		const done = row.kind === "step" && row.status === "completed" ? row.attempts.at(-1)?.to : null;
		if (done) for (const { from, n } of this.run.attempts) if (from >= done) add(from, from, "replayed", { n });
		return bars;
	}

	/** All rows but the run's, in the order of their begin; of children those that the run itself made. */
	ordered() {
		const begin = (row) => row.attempts[0]?.from ?? row.waits[0]?.from ?? (row.copied ? 0 : Infinity);
		return this.order ??= [...this.rows.values()].filter((row) => row.kind !== "run" && !(row.kind === "child" && row.depth > 1))
			.sort((a, b) => (a.step && b.step ? a.step.position - b.step.position : begin(a) - begin(b)));
	}

	childrenOf(id) {
		return [...this.rows.values()].filter((row) => row.kind === "child" && row.parent === id);
	}
}

/** An attempt of a row, made when there is none. Events of a step that was recorded at its end are written together: the earliest instant counts. */
function attemptOf(row, n, from) {
	let attempt = row.attempts.find((one) => one.n === n);
	if (!attempt) {
		row.attempts.push(attempt = { n, from, to: null, outcome: "running" });
		row.attempts.sort((a, b) => a.n - b.n);
	}
	attempt.from = Math.min(attempt.from, from);
	return attempt;
}

// --- time on the screen

const BUSY = new Set(["completed", "running", "failed", "cut", "review", "held", "cancelled"]);
const FOLD_SHARE = 0.05; // of the width, for a folded stretch

/** Where instants are between 0 and 1; stretches without activity are folded when they are long beside the rest. */
export function makeScale(intervals, start, end, folding) {
	const merged = [];
	for (const [from, to] of intervals.sort((a, b) => a[0] - b[0])) {
		const last = merged.at(-1);
		if (last && from <= last[1]) last[1] = Math.max(last[1], to);
		else merged.push([Math.max(from, start), to]);
	}
	const shortest = Math.max(300, merged.reduce((sum, [from, to]) => sum + to - from, 0) * 0.3);
	const pieces = [];
	let at = start;
	const push = (to, folded) => {
		const last = pieces.at(-1);
		if (to <= at) return;
		if (last && !folded && !last.folded) last.to = to;
		else pieces.push({ from: at, to, folded });
		at = to;
	};
	for (const [from, to] of [...merged, [end, end]]) {
		push(from, folding && from - at > shortest && merged.length > 0);
		push(to, false);
	}
	if (pieces.length === 0) pieces.push({ from: start, to: start + 1, folded: false });
	const folds = pieces.filter((piece) => piece.folded).length;
	const open = pieces.reduce((sum, piece) => sum + (piece.folded ? 0 : piece.to - piece.from), 0) || 1;
	const share = folds && Math.min(FOLD_SHARE, 0.3 / folds);
	let x = 0;
	for (const piece of pieces) {
		piece.x = x;
		x += piece.folded ? share : ((piece.to - piece.from) / open) * (1 - share * folds);
		piece.end = x;
	}
	const place = (instant) => {
		let low = 0;
		for (let high = pieces.length - 1; low < high;) {
			const middle = (low + high + 1) >> 1;
			if (pieces[middle].from <= instant) low = middle;
			else high = middle - 1;
		}
		const { from, to, x: left, end: right } = pieces[low];
		return left + Math.max(0, Math.min(1, (instant - from) / (to - from))) * (right - left);
	};
	return { pieces, start, open, place };
}

const NICE = [1, 2, 5, 10, 20, 50, 100, 200, 500, 1e3, 2e3, 5e3, 1e4, 15e3, 3e4, 6e4, 12e4, 3e5, 6e5, 9e5, 18e5, 36e5, 72e5, 216e5, 432e5, 864e5, 1728e5, 6048e5];

/** Ticks where there is room for their words, which are `room` wide. */
function ticksOf(scale, wanted, room) {
	const step = NICE.find((size) => scale.open / size <= wanted) ?? NICE.at(-1);
	const ticks = [];
	for (const piece of scale.pieces.filter(({ folded }) => !folded)) {
		for (let n = Math.ceil((piece.from - scale.start) / step); scale.start + n * step <= piece.to; n += 1) {
			const x = scale.place(scale.start + n * step);
			const text = n === 0 ? "0" : duration(n * step);
			const last = ticks.at(-1);
			const hidden = scale.pieces.some((other) => other.folded && other.x >= x && other.x < x + room);
			if (!hidden && x <= 1 - room && !(last && (x - last.x < 1.3 * room || text === last.text))) ticks.push({ x, text });
		}
	}
	return ticks;
}

// --- the view

const ICON_OF = { gate: "approvals", wait: "clock", child: "runs" };
const percent = (x) => `${(100 * x).toFixed(3)}%`;
const placed = (node, from, to) => Object.assign(node.style, { left: percent(from), width: percent(to - from) }) && node;
const isError = (row) => /^failed|manual_review/.test(row.status) || row.attempts.some((one) => one.outcome === "failed" || one.outcome === "cut");

/** The table of a timeline. onSelect(row) is called with the row that was clicked; onOpen(id) brings a child's Timeline. */
export class Waterfall {
	constructor(timeline, { onSelect, onOpen, signal }) {
		Object.assign(this, { timeline, onSelect, onOpen, folding: true, errorsOnly: false, text: "", chosen: null, frame: null });
		this.opened = new Map(); // children whose own rows are shown -> their Timeline
		const toggle = (word, key, title) => button(word, ({ target }) => {
			this[key] = !this[key];
			target.setAttribute("aria-pressed", String(this[key]));
			this.draw();
		}, "", { "aria-pressed": String(this[key]), title });
		this.axis = el("div.track.axis");
		this.table = el("table.waterfall", { "aria-label": "Steps over time" }, el("thead", el("tr", el("th.w-name", "Step"), el("th.w-time", "Duration"), el("th.w-track", el("span.offscreen", "Time"), this.axis))));
		this.rows = new VirtualRows(this.table, 3, { keyOf: (row) => row.key, make: (row) => this.makeRow(row), update: (node, row) => this.updateRow(node, row) }, signal);
		this.nothing = el("p.empty");
		this.legend = el("div.legend", { "aria-hidden": "true" });
		this.tally = muted();
		const search = searchInput("Filter steps", "Filter steps by name", (text) => { this.text = text.toLowerCase(); this.draw(); });
		this.element = el("section.card", el("header", search, el("div.counts", toggle("Errors only", "errorsOnly", "Only steps that failed or were cut off"),
			toggle("Fold idle", "folding", "Fold stretches in which nothing happened")), this.tally), this.table, this.nothing, el("div.body", this.legend));
		const observer = new ResizeObserver(() => this.schedule());
		observer.observe(this.table);
		signal.addEventListener("abort", () => observer.disconnect());
	}

	/** Draw soon: what comes in a tenth of a second is drawn once. */
	schedule() {
		this.frame ??= setTimeout(() => {
			this.frame = null;
			this.draw();
		}, 100);
	}

	/** The rows to show: filtered, and below a child that was unfolded its own steps and children. */
	shown() {
		const fits = (row) => (!this.text || row.name.toLowerCase().includes(this.text)) && (!this.errorsOnly || isError(row));
		const list = [this.timeline.run];
		const add = (row) => {
			if (fits(row)) list.push(row);
			const own = this.opened.get(row.key);
			if (!own) return;
			for (const step of own.ordered()) if (fits(step)) list.push(Object.assign(step, { depth: row.depth + 1, owner: own }));
			this.timeline.childrenOf(row.key).forEach(add);
		};
		this.timeline.ordered().forEach(add);
		return list;
	}

	draw() {
		const { timeline } = this;
		const list = this.shown();
		this.end = timeline.ended ?? now();
		const kinds = new Set();
		const busyOf = (rows) => rows.flatMap((row) => (row.owner ?? timeline).bars(row).filter((bar) => kinds.add(bar.kind) && BUSY.has(bar.kind))
			.map((bar) => [bar.from, Math.max(bar.to ?? this.end, bar.from + 1)]));
		const [ofRun, ofSteps] = [busyOf(list.slice(0, 1)), busyOf(list.slice(1))];
		const busy = ofSteps.length ? ofSteps : ofRun;
		const end = busy.reduce((most, [, to]) => Math.max(most, to), Math.max(this.end, timeline.created + 1));
		this.scale = makeScale(busy, timeline.created, end, this.folding);
		this.drawAxis();
		this.rows.set(list);
		show(this.nothing, list.length === 1);
		setText(this.nothing, timeline.rows.size > 1 ? "No step matches." : timeline.ended ? "It ended without a step." : "No step has begun yet.");
		setText(this.tally, plural(list.filter((row) => row.kind === "step").length, "step"));
		const words = Object.keys(WORDS).filter((kind) => kinds.has(kind));
		if (words.join() === this.legend.shown) return;
		this.legend.shown = words.join();
		fill(this.legend, words.map((kind) => el("span", el("i", el(`span.bar.bar-${kind}`)), WORDS[kind])));
	}

	drawAxis() {
		const width = this.axis.clientWidth || 600;
		const folds = this.scale.pieces.filter((piece) => piece.folded).map((piece) => [piece.x, piece.end, duration(piece.to - piece.from)]);
		const ticks = ticksOf(this.scale, Math.max(2, Math.floor(width / 70)), 46 / width);
		const drawn = JSON.stringify([width, folds, ticks]);
		if (drawn === this.axis.drawn) return;
		this.axis.drawn = drawn;
		fill(this.axis, ticks.map(({ x, text }) => placed(el("span.tick", text), x, x)),
			folds.map(([x, to, text]) => placed(el("span.fold", { title: `nothing happened for ${text}` }, (to - x) * width > 44 ? text : "⋯"), x, to)));
	}

	makeRow(row) {
		const [name, symbol, time, track] = [el("span"), el("span"), el("td.w-time"), el("div.track")];
		const open = button([symbol, name], () => this.onSelect(node.row), "step-name", { "data-row": "" });
		const unfold = row.kind === "child" && iconButton("chevron", `Steps of ${row.name}`, () => this.toggleChild(node.row.key, unfold), { "aria-expanded": "false" });
		const node = el("tr", { onclick: (event) => !event.target.closest("button") && this.onSelect(node.row) }, el("td.w-name", unfold ? el("div.unfolds", unfold, open) : open), time, el("td.w-track", track));
		return Object.assign(node, { name, symbol, time, track, open });
	}

	updateRow(node, row) {
		node.row = row;
		setText(node.name, row.name);
		if (row.depth > 1) node.firstChild.style.paddingLeft = `${1.2 * row.depth - 0.6}rem`;
		node.classList.toggle("chosen", this.chosen === row.key);
		const gone = row.kind === "step" && row.status === "running" && row.attempts.at(-1)?.outcome === "cut";
		const shown = gone ? "stalled" : row.status ?? "pending";
		if (node.shown !== shown) {
			node.shown = shown;
			node.open.title = row.name;
			node.open.setAttribute("aria-label", `${row.name}: ${shown.replace("_", " ")}`);
			node.symbol.className = `status status-${shown}`;
			fill(node.symbol, icon(ICON_OF[row.kind] ?? shown));
		}
		const bars = (row.owner ?? this.timeline).bars(row);
		setText(node.time, this.timeOf(row, bars));
		const { pieces, place } = this.scale;
		const drawn = pieces.length + bars.map((bar) => bar.kind + percent(place(bar.from)) + percent(place(bar.to ?? this.end))).join();
		if (node.drawn === drawn) return;
		node.drawn = drawn;
		fill(node.track, pieces.filter((piece) => piece.folded).map((piece) => placed(el("span.fold"), piece.x, piece.end)), bars.map(({ from, to, kind, n, owner }) => {
			const end = to ?? this.end;
			const describe = () => `${WORDS[kind] ?? kind}${n ? `, attempt ${n}` : ""}${owner ? ` by ${owner}` : ""}, ${duration(end - from)}\nfrom ${wholeInstant(from)}`;
			return Object.assign(placed(el(`span.bar.bar-${kind}${to === null && kind === "running" ? ".bar-live" : ""}`), place(from), place(end)), { describe });
		}));
	}

	timeOf(row, bars) {
		if (row.kind === "run") return duration(this.end - this.timeline.created);
		const busy = bars.filter((bar) => BUSY.has(bar.kind));
		const list = busy.length ? busy : bars.filter((bar) => bar.kind === "waiting");
		if (list.length === 0) return row.copied ? "copied" : "–";
		return duration(list.reduce((sum, bar) => sum + (bar.to ?? this.end) - bar.from, 0));
	}

	async toggleChild(id, unfold) {
		if (!this.opened.delete(id)) this.opened.set(id, await this.onOpen(id));
		unfold.setAttribute("aria-expanded", String(this.opened.has(id)));
		this.draw();
	}

	choose(key) {
		this.chosen = key;
		this.draw();
	}
}
