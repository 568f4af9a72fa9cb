// The waterfall: a run's steps, gates, waits and children over time.
//
// Timeline turns events and rows into bars; it is fed one event at a time and keeps what it worked out for each row, so
// that one more event costs the same in a run of a thousand steps. makeScale says where an instant is on the screen, with
// idle stretches folded. Waterfall draws the rows that are on the screen.

import { button, duration, el, fill, icon, iconButton, now, plural, searchInput, setText, show, wholeInstant } from "./dom.js";
import { VirtualRows } from "./virtual.js";

const ms = (iso) => (iso ? Date.parse(iso) : null);

const OUTCOME_OF = {
  completed: "completed", failed: "failed", failed_retryable: "failed", manual_review: "review", running: "running",
};
const STATUS_OF_EVENT = {
  "step.completed": "completed", "step.failed": "failed", "step.manual_review": "manual_review", "step.started": "running",
};

/** What happened when: rows with attempts and waits, made from a run's events and rows. */
export class Timeline {
  constructor(leaseMs, runId = null) {
    Object.assign(this, { leaseMs, runId });
    this.rows = new Map(); // key -> row
    this.run = this.row("run", "run", "run");
    this.held = []; // the run's own attempts: {from, to, outcome, owner}
    this.idle = []; // what it did between them: {from, to, kind: queued | waiting | gap}
    this.heardAt = 0; // when the run was last seen at work
    this.seq = 0;
    this.children = new Map();
    this.order = null; // the rows in the order of their begin, worked out again when there is a new one
  }

  row(key, kind, name) {
    let row = this.rows.get(key);
    if (!row) {
      row = { key, kind, name, attempts: [], waits: [], status: null, copied: false, bars: null, depth: 0, step: null };
      this.rows.set(key, row);
      this.order = null;
    }
    return row;
  }

  setRun(run) {
    this.created = ms(run.createdAt);
    this.ended = ms(run.completedAt);
    this.status = run.stalled ? "stalled" : run.status;
    this.run.name = run.workflowName;
    this.run.status = this.status;
    this.run.bars = null;
  }

  /** A step as its row says it: the last attempt's exact times, and what events do not carry. */
  setStep(step) {
    const row = this.row(step.id, "step", step.name);
    const from = ms(step.startedAt ?? step.createdAt);
    // A checkpoint that a fork began with is older than the fork.
    row.copied = step.copied || (step.status === "completed" && from < this.created);
    Object.assign(row, { step, status: step.status, bars: null });
    if (row.copied) return;
    let attempt = row.attempts.find((one) => one.n === step.attempt);
    if (!attempt) row.attempts.push(attempt = { n: step.attempt, from, to: null, outcome: "running", owner: step.leaseOwner });
    // Events of a step that was recorded at its end are written together; the row knows when it began.
    if (from < attempt.from) attempt.from = from;
    if (step.status !== "running" && step.status !== "manual_review") {
      attempt.to = ms(step.completedAt) ?? attempt.to ?? ms(step.updatedAt);
      attempt.outcome = OUTCOME_OF[step.status];
    }
    row.attempts.sort((a, b) => a.n - b.n);
  }

  setGate(gate) {
    const row = this.row(gate.id, "gate", gate.name);
    row.status = gate.status === "pending" ? "waiting" : gate.status;
    row.gate = gate;
    row.waits = [{ from: ms(gate.createdAt), to: ms(gate.resolvedAt) }];
    row.bars = null;
  }

  /** A run of the subtree. */
  setChild(child) {
    const row = this.row(child.id, "child", child.name ?? child.workflowName);
    row.child = child;
    row.parent = child.parentRunId;
    row.depth = child.depth;
    row.status = child.status;
    row.attempts = child.startedAt
      ? [{ n: 1, from: ms(child.startedAt), to: ms(child.completedAt), outcome: OUTCOME_OF[child.status] ?? child.status }] : [];
    row.waits = [{ from: ms(child.createdAt), to: ms(child.startedAt) ?? ms(child.completedAt), kind: "queued" }];
    row.bars = null;
    this.children.set(child.id, row);
  }

  apply(event) {
    if (event.seq <= this.seq) return;
    this.seq = event.seq;
    const at = ms(event.createdAt);
    const [subject, verb] = event.type.split(".");
    if (subject === "run") this.applyToRun(verb, event, at);
    else if (subject === "step" && event.stepId) this.applyToStep(event, at);
    if (subject !== "gate" && subject !== "signal" && subject !== "recovery") this.heardAt = at;
    this.run.bars = null;
  }

  applyToRun(verb, event, at) {
    const payload = event.payload ?? {};
    if (verb === "claimed" || verb === "started") {
      const last = this.held.at(-1);
      if (last && last.to === null && last.owner === payload.leaseOwner) return; // begun by who claimed it
      this.cut(at);
      this.endIdle(at);
      this.held.push({ from: at, to: null, outcome: "running", owner: payload.leaseOwner, n: event.attempt ?? this.held.length + 1 });
    } else if (verb === "created" || verb === "enqueued" || verb === "retried") {
      this.endIdle(at);
      this.idle.push({ from: at, to: null, kind: "queued" });
    } else if (verb === "requeued") {
      const expired = payload.reason === "lease_expired" || payload.error?.name === "LeaseExpired";
      if (expired) this.cut(at);
      else this.release(at, "failed");
      this.idle.push({ from: expired ? this.heardAt : at, to: null, kind: expired ? "gap" : "queued" });
    } else if (verb === "released") {
      this.release(at, "held");
      this.idle.push({ from: at, to: null, kind: "queued" });
    } else if (verb === "stalled") {
      this.cut(at);
      this.idle.push({ from: this.heardAt, to: null, kind: "gap" });
    } else if (verb === "waiting") {
      this.release(at, "held");
      this.idle.push({ from: at, to: null, kind: "waiting" });
      this.waitRow(payload.for)?.waits.push({ from: at, to: null });
    } else if (verb === "resumed") {
      this.endIdle(at);
      this.idle.push({ from: at, to: null, kind: "queued" });
      const row = this.waitRow(payload.waitedFor);
      if (row?.waits.at(-1)?.to === null) row.waits.at(-1).to = at;
    } else if (verb === "completed" || verb === "failed" || verb === "cancelled") {
      this.release(at, verb === "completed" ? "completed" : verb);
      this.endIdle(at);
      for (const row of this.rows.values()) {
        if (row.waits.at(-1)?.to === null && row.kind === "wait") row.waits.at(-1).to = at;
      }
    }
  }

  /** The row of a sleep or a signal; gates have their own, children theirs. */
  waitRow(what) {
    if (!what) return null;
    if (what.event) return this.touched(this.row(`signal:${what.event}`, "wait", `signal ${what.event}`));
    if (what.until) return this.touched(this.row("sleep", "wait", "sleep"));
    return null;
  }

  touched(row) {
    row.bars = null;
    return row;
  }

  /** Its worker was not heard of again: what was under way ended some time after it was last seen. */
  cut(at) {
    const last = this.held.at(-1);
    if (!last || last.to !== null) return;
    this.heardAt = Math.max(this.heardAt, Math.min(at, at - this.leaseMs));
    last.to = this.heardAt;
    last.outcome = "cut";
    this.closeSteps(this.heardAt, "cut");
    this.idle.push({ from: this.heardAt, to: at, kind: "gap" });
  }

  release(at, outcome) {
    const last = this.held.at(-1);
    if (last?.to === null) Object.assign(last, { to: at, outcome });
    this.closeSteps(at, outcome === "cancelled" ? "cancelled" : "held");
  }

  closeSteps(at, outcome) {
    for (const row of this.rows.values()) {
      if (row.kind !== "step") continue;
      for (const attempt of row.attempts) {
        if (attempt.to === null && attempt.from <= at) Object.assign(attempt, { to: at, outcome });
      }
      row.bars = null;
    }
  }

  endIdle(at) {
    for (let index = this.idle.length - 1; index >= 0 && this.idle[index].to === null; index -= 1) this.idle[index].to = at;
  }

  applyToStep(event, at) {
    const row = this.row(event.stepId, "step", event.name);
    row.bars = null;
    const status = STATUS_OF_EVENT[event.type];
    const attemptOf = (n) => row.attempts.find((one) => one.n === n);
    if (event.type === "step.started") {
      const before = attemptOf(row.current);
      row.current = event.attempt ?? (row.current ?? 0) + 1;
      if (before?.to === null && before.n !== row.current) Object.assign(before, { to: at, outcome: "cut" });
      const known = attemptOf(row.current);
      if (known) known.from = Math.min(known.from, at); // from its row, which is read first
      else row.attempts.push({ n: row.current, from: at, to: null, outcome: "running" });
      row.attempts.sort((a, b) => a.n - b.n);
    } else if (status) {
      // These events name no attempt: they end the one that began last.
      let attempt = attemptOf(row.current);
      if (!attempt) row.attempts.push(attempt = { n: row.current ?? 1, from: at, to: null });
      if (attempt.to === null) Object.assign(attempt, { to: at, outcome: OUTCOME_OF[status] });
    }
    if (status && event.seq > (row.statusSeq ?? 0)) {
      row.statusSeq = event.seq;
      // A row that was read after this event knows better.
      if (!row.step || at >= ms(row.step.updatedAt)) row.status = status === "failed" && row.step?.status === "failed_retryable" ? row.step.status : status;
    }
  }

  /** A row's bars: {from, to (null: until now), kind, title}. */
  bars(row) {
    row.bars ??= row.kind === "run" ? this.runBars() : this.rowBars(row);
    return row.bars;
  }

  runBars() {
    const bars = this.idle.filter(({ from, to }) => to === null || to > from)
      .map(({ from, to, kind }) => ({ from, to: this.close(to), kind, title: { queued: "in the queue", waiting: "waiting", gap: "nobody at work" }[kind] }));
    for (const { from, to, outcome, owner, n } of this.held) {
      bars.push({ from, to: this.close(to), kind: outcome, title: `attempt ${n}${owner ? ` by ${owner}` : ""}` });
    }
    if (bars.length === 0) bars.push({ from: this.created, to: this.ended, kind: OUTCOME_OF[this.status] ?? "queued", title: this.status });
    return bars;
  }

  rowBars(row) {
    const bars = [];
    if (row.copied) bars.push({ from: this.created, to: this.created, kind: "replayed", title: "copied from the run that this is a fork of" });
    for (const wait of row.waits) {
      bars.push({ from: wait.from, to: this.close(wait.to), kind: wait.kind ?? "waiting", title: wait.kind ?? "waiting" });
    }
    row.attempts.forEach((attempt, index) => {
      const next = row.attempts[index + 1];
      const outcome = attempt.outcome === "running" && this.ended ? "cancelled" : attempt.outcome;
      bars.push({ from: attempt.from, to: this.close(attempt.to), kind: outcome, title: `attempt ${attempt.n}: ${WORD_OF[outcome] ?? outcome}` });
      const inReview = row.status === "manual_review" && !next;
      if (inReview) bars.push({ from: attempt.to ?? attempt.from, to: this.close(null), kind: "waiting", title: "waits for a person's review" });
      else if (outcome === "cut") bars.push({ from: attempt.to, to: this.close(next?.from ?? null), kind: "gap", title: "its worker was gone" });
    });
    if (row.kind === "step" && row.status === "completed" && row.attempts.length) {
      const done = row.attempts.at(-1).to;
      for (const { from, n } of this.held) {
        if (done !== null && from >= done) bars.push({ from, to: from, kind: "replayed", title: `replayed in attempt ${n}` });
      }
    }
    return bars;
  }

  close(to) {
    return to ?? this.ended;
  }

  /** All rows, in the order of their begin; children below the run that made them. */
  ordered() {
    if (this.order) return this.order;
    const begin = (row) => row.attempts[0]?.from ?? row.waits[0]?.from ?? (row.copied ? 0 : Infinity);
    const top = [...this.rows.values()].filter((row) => row.kind !== "run" && !(row.kind === "child" && row.depth > 1));
    top.sort((a, b) => (a.step && b.step ? a.step.position - b.step.position : 0) || begin(a) - begin(b));
    this.order = top;
    return top;
  }

  childrenOf(id) {
    return [...this.children.values()].filter((row) => row.parent === id);
  }
}

const WORD_OF = { cut: "cut off, its worker was gone", held: "ended", review: "ended without an outcome" };

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
  const busy = merged.reduce((sum, [from, to]) => sum + to - from, 0);
  const shortest = Math.max(300, busy * 0.3);
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
  const share = folds ? Math.min(FOLD_SHARE, 0.3 / folds) : 0;
  let x = 0;
  for (const piece of pieces) {
    piece.x = x;
    x += piece.folded ? share : ((piece.to - piece.from) / open) * (1 - share * folds);
    piece.end = x;
  }
  return { pieces, start, end, open, place: (instant) => place(pieces, instant) };
}

function place(pieces, instant) {
  let low = 0;
  let high = pieces.length - 1;
  while (low < high) {
    const middle = (low + high + 1) >> 1;
    if (pieces[middle].from <= instant) low = middle;
    else high = middle - 1;
  }
  const { from, to, x, end } = pieces[low];
  return x + Math.max(0, Math.min(1, (instant - from) / (to - from))) * (end - x);
}

const NICE = [1, 2, 5, 10, 20, 50, 100, 200, 500, 1e3, 2e3, 5e3, 1e4, 15e3, 3e4, 6e4, 12e4, 3e5, 6e5, 9e5, 18e5, 36e5, 72e5,
  216e5, 432e5, 864e5, 1728e5, 6048e5];

function ticksOf(scale, wanted) {
  const step = NICE.find((size) => scale.open / size <= wanted) ?? NICE.at(-1);
  const ticks = [];
  let lastX = -1;
  for (const piece of scale.pieces.filter(({ folded }) => !folded)) {
    for (let n = Math.ceil((piece.from - scale.start) / step); scale.start + n * step <= piece.to; n += 1) {
      const x = scale.place(scale.start + n * step);
      const hidden = scale.pieces.some((other) => other.folded && other.x >= x && other.x < x + 0.5 / wanted);
      if (x - lastX < 0.7 / wanted || x > 1 - 0.5 / wanted || hidden) continue;
      ticks.push({ x, text: n === 0 ? "0" : duration(n * step) });
      lastX = x;
    }
  }
  return ticks;
}

// --- the view

const ICON_OF = { gate: "approvals", wait: "clock", child: "runs" };
const LEGEND = [["completed", "completed"], ["running", "running"], ["failed", "failed"], ["cut", "cut off"], ["gap", "nobody at work"],
  ["waiting", "waiting"], ["queued", "in the queue"], ["replayed", "replayed"]];

const percent = (x) => `${(100 * x).toFixed(3)}%`;
const placed = (node, from, to) => Object.assign(node.style, { left: percent(from), width: percent(to - from) }) && node;
const isError = (row) => /^failed|manual_review/.test(row.status) || row.attempts.some((one) => one.outcome === "failed" || one.outcome === "cut");

/** The table of a timeline. onSelect(row) is called with the row that was clicked; onOpen(id) brings a child's Timeline. */
export class Waterfall {
  constructor(timeline, { onSelect, onOpen, signal }) {
    Object.assign(this, { timeline, onSelect, onOpen, folding: true, errorsOnly: false, text: "", chosen: null, frame: null });
    this.opened = new Map(); // children whose own rows are shown -> their Timeline
    const toggle = (word, key, title) => {
      const node = button(word, () => {
        this[key] = !this[key];
        node.setAttribute("aria-pressed", String(this[key]));
        this.draw();
      }, "", { "aria-pressed": String(this[key]), title });
      return node;
    };
    this.axis = el("div.track.axis");
    this.table = el("table.waterfall", { "aria-label": "Steps over time" }, el("thead", el("tr", el("th.w-name", "Step"), el("th.w-time", "Duration"), el("th.w-track", el("span.offscreen", "Time"), this.axis))));
    this.rows = new VirtualRows(this.table, 3, { keyOf: (row) => row.key, make: (row) => this.makeRow(row), update: (node, row) => this.updateRow(node, row) }, signal);
    this.nothing = el("p.empty");
    this.legend = el("div.legend", { "aria-hidden": "true" });
    this.tally = el("span.muted");
    const search = searchInput("Filter steps", "Filter steps by name", (text) => { this.text = text.toLowerCase(); this.draw(); });
    this.element = el("section.card", el("header", search, el("div.counts", toggle("Errors only", "errorsOnly", "Only steps that failed or were cut off"),
      toggle("Fold idle", "folding", "Fold stretches in which nothing happened")), this.tally), this.table, this.nothing, el("div.body", this.legend));
    const observer = new ResizeObserver(() => this.schedule());
    observer.observe(this.table);
    signal.addEventListener("abort", () => observer.disconnect());
  }

  /** Draw on the next frame; many events in one frame are drawn once. */
  schedule() {
    this.frame ??= requestAnimationFrame(() => {
      this.frame = null;
      this.draw();
    });
  }

  /** The rows to show: filtered, and below a child that was unfolded its own steps and children. */
  shown() {
    const fits = (row) => (!this.text || row.name.toLowerCase().includes(this.text)) && (!this.errorsOnly || isError(row));
    const list = [this.timeline.run];
    const addChild = (row) => {
      if (fits(row)) list.push(row);
      const own = this.opened.get(row.key);
      if (!own) return;
      for (const step of own.ordered()) if (fits(step)) list.push(Object.assign(step, { depth: row.depth + 1, owner: own }));
      this.timeline.childrenOf(row.key).forEach(addChild);
    };
    for (const row of this.timeline.ordered()) {
      if (row.kind === "child") addChild(row);
      else if (fits(row)) list.push(row);
    }
    return list;
  }

  draw() {
    const { timeline } = this;
    const list = this.shown();
    this.end = timeline.ended ?? now();
    const kinds = new Set();
    const busyOf = (rows) => rows.flatMap((row) => (row.owner ?? timeline).bars(row).filter((bar) => kinds.add(bar.kind) && BUSY.has(bar.kind))
      .map((bar) => [bar.from, Math.max(bar.to ?? this.end, bar.from + 1)]));
    const ofSteps = busyOf(list.slice(1));
    const ofRun = busyOf(list.slice(0, 1));
    const busy = ofSteps.length ? ofSteps : ofRun;
    const end = busy.reduce((most, [, to]) => Math.max(most, to), Math.max(this.end, timeline.created + 1));
    this.scale = makeScale(busy, timeline.created, end, this.folding);
    this.drawAxis();
    this.rows.set(list);
    show(this.nothing, list.length === 1);
    setText(this.nothing, timeline.rows.size > 1 ? "No step matches." : timeline.ended ? "It ended without a step." : "No step has begun yet.");
    setText(this.tally, plural(list.filter((row) => row.kind === "step").length, "step"));
    const words = LEGEND.filter(([kind]) => kinds.has(kind));
    if (words.join() === this.words) return;
    this.words = words.join();
    fill(this.legend, words.map(([kind, word]) => el("span", el("i", el(`span.bar.bar-${kind}`)), word)));
  }

  drawAxis() {
    const width = this.axis.clientWidth || 600;
    const folds = this.scale.pieces.filter((piece) => piece.folded).map((piece) => [piece.x, piece.end, duration(piece.to - piece.from)]);
    const ticks = ticksOf(this.scale, Math.max(2, Math.floor(width / 90)));
    const drawn = JSON.stringify([width, folds, ticks]);
    if (drawn === this.drawnAxis) return;
    this.drawnAxis = drawn;
    fill(this.axis, ticks.map(({ x, text }) => placed(el("span.tick", text), x, x)),
      folds.map(([x, to, text]) => placed(el("span.fold", { title: `nothing happened for ${text}` }, (to - x) * width > 44 ? text : "⋯"), x, to)));
  }

  makeRow(row) {
    const [name, symbol, time, track] = [el("span"), el("span"), el("td.w-time"), el("div.track")];
    const open = button([symbol, name], () => this.onSelect(node.row), "step-name");
    const unfold = row.kind === "child" && iconButton("chevron", `Steps of ${row.name}`, () => this.toggleChild(node.row.key, unfold), { "aria-expanded": "false" });
    const node = el("tr", { onclick: (event) => !event.target.closest("button") && this.onSelect(node.row) }, el("td.w-name", unfold ? el("div.unfolds", unfold, open) : open), time, el("td.w-track", track));
    return Object.assign(node, { name, symbol, time, track, open });
  }

  updateRow(node, row) {
    node.row = row;
    setText(node.name, row.name);
    if (row.depth > 1) node.firstChild.style.paddingLeft = `${1.2 * row.depth - 0.6}rem`;
    node.classList.toggle("chosen", this.chosen === row.key);
    const shown = row.status ?? "pending";
    if (node.shown !== shown) {
      node.shown = shown;
      node.open.title = row.name;
      node.open.setAttribute("aria-label", `${row.name}: ${shown.replace("_", " ")}`);
      node.symbol.className = `status status-${shown}`;
      fill(node.symbol, icon(ICON_OF[row.kind] ?? shown));
    }
    const bars = (row.owner ?? this.timeline).bars(row);
    setText(node.time, this.timeOf(row, bars));
    const { pieces, place: placeOf } = this.scale;
    const drawn = pieces.length + bars.map((bar) => bar.kind + percent(placeOf(bar.from)) + percent(placeOf(bar.to ?? this.end))).join();
    if (node.drawn === drawn) return;
    node.drawn = drawn;
    fill(node.track, pieces.filter((piece) => piece.folded).map((piece) => placed(el("span.fold"), piece.x, piece.end)), bars.map((bar) => {
      const to = bar.to ?? this.end;
      const live = bar.to === null && bar.kind === "running" ? ".bar-live" : "";
      return placed(el(`span.bar.bar-${bar.kind}${live}`, { title: `${bar.title ?? bar.kind}, ${duration(to - bar.from)}\nfrom ${wholeInstant(bar.from)}` }), placeOf(bar.from), placeOf(to));
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

  chosenRow() {
    return this.rows.items.find((row) => row.key === this.chosen) ?? this.timeline.run;
  }

  /** Choose the next or the previous row. */
  move(by) {
    const { items } = this.rows;
    const index = Math.max(0, Math.min(items.length - 1, items.findIndex((row) => row.key === this.chosen) + by));
    this.choose(items[index].key);
    this.rows.reveal(index);
  }
}
