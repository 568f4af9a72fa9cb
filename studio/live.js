// What is known of a run: read once, then kept up to date by its stream of events, by seq. Pages draw from it.

import { follow, get, getText, laterAgain, path, readPages, session } from "./api.js";
import { debounce, setMark } from "./dom.js";
import { items, member } from "./payload.js";

const MOST_EVENTS = 20_000; // of a longer run, the newest so many are read
const soon = (read) => debounce(() => read().catch(laterAgain), 150); // events come in bursts

export class LiveRun {
	light = null; // the run as lists have it. Beside it stand counts, cost, state, parent and durationMs
	events = []; // those after firstSeq, in order, each with its text and `at`, its time in ms
	steps = new Map(); // by id
	gates = []; // each with `raw`, its text
	tree = []; // its children, and theirs
	unfolded = new Map(); // children that the reader looks into, by id: LiveRuns
	leaseMs = session.leaseMs;
	readSummarySoon = soon(() => this.readSummary());
	readStepsSoon = soon(() => this.readSteps());
	readGatesSoon = soon(() => this.readGates());
	readTreeSoon = soon(() => this.readTree());

	constructor(id, signal) {
		Object.assign(this, { id, signal, url: path`/runs/${id}` });
	}

	/** What draws it is called with the events that came, or with null after anything else was read. */
	onChange() {}

	get isLive() {
		return !this.light.completedAt;
	}

	/** The newest event that what is read now reflects. */
	get seq() {
		return Math.max(this.light.eventSeq, this.events.at(-1)?.seq ?? 0);
	}

	/** The step in which the run's error happened. */
	get failedStep() {
		const { name, message } = this.light.error ?? {};
		const steps = [...this.steps.values()].reverse();
		return steps.find(({ error }) => name && error?.name === name && error.message === message)
			?? (/LeaseExpired|Review/.test(name) && steps.find(({ status: is }) => /running|manual_review/.test(is)));
	}

	async readSummary() {
		const { run: light, ...others } = await get(`${this.url}/summary`);
		Object.assign(this, others, { light });
		this.onChange(null);
	}

	/** Steps that were begun after those that are here: of these, events tell how they go on. */
	async readSteps(after = Math.max(...[...this.steps.values()].map(({ position }) => position))) {
		const { seq } = this;
		await readPages(`${this.url}/steps`, "steps", { after: Number.isFinite(after) ? after : null, limit: 500 },
			(steps) => this.keepSteps(steps, seq));
		this.onChange(null);
	}

	/** One of them again: events do not carry all of it. */
	async readStep(id) {
		if (!this.steps.has(id)) await this.readSteps();
		const { seq } = this;
		const { steps } = await get(`${this.url}/steps`, { after: this.steps.get(id).position - 1, limit: 1 });
		this.keepSteps(steps, seq);
		return steps[0];
	}

	/** `seq`: the newest event that they are known to reflect. */
	keepSteps(steps, seq) {
		for (const step of steps) this.steps.set(step.id, { ...step, seq });
	}

	async readGates() {
		const text = await getText(this.url, { include: "gates" });
		this.gates = items(member(text, "gates")).map((raw) => ({ ...JSON.parse(raw), raw }));
		this.onChange(null);
	}

	async readTree() {
		const { runs, truncated } = await get(`${this.url}/tree`, { limit: 1000 });
		Object.assign(this, { tree: runs.slice(1), treeTruncated: truncated });
		for (const child of this.unfolded.values()) if (child.isLive) await child.readAll();
		this.onChange(null);
	}

	async readAll() {
		await this.readSummary();
		await this.readSteps(null);
	}

	/** Look into a child, or no longer. */
	async unfold(id) {
		if (this.unfolded.delete(id)) return;
		const child = new LiveRun(id, this.signal);
		await child.readAll();
		this.unfolded.set(id, child);
	}

	async readOthers() {
		const wanted = [this.counts.gates && this.readGates(), this.counts.children && this.readTree()];
		await Promise.all(wanted.filter(Boolean).map((reading) => reading.catch(laterAgain)));
	}

	/** What no event of this run tells: how its children, deliveries and lease are. */
	async readAgain() {
		if (this.counts.childrenLive) this.readTreeSoon();
		await this.readSummary();
	}

	/** `mark` says how fresh the page is. After a gap all is read that events do not tell. */
	follow(mark) {
		this.firstSeq = Math.max(0, this.light.eventSeq - MOST_EVENTS);
		let lost = false;
		follow(this.id, this.firstSeq, (batch) => this.take(batch), (state) => {
			setMark(mark, state);
			if (state === "live" && lost) {
				this.readSummarySoon();
				this.readOthers();
			}
			lost = state !== "live";
		}, this.signal);
	}

	take(batch) {
		const events = batch.map(({ text }) => {
			const event = JSON.parse(text);
			return Object.assign(event, { text, at: Date.parse(event.createdAt) });
		});
		const isNews = batch.at(-1).seq > this.seq; // and not history
		this.events.push(...events);
		this.counts.events = Math.max(this.counts.events, batch.at(-1).seq);
		const some = (kind) => isNews && events.some(({ type }) => type.startsWith(kind));
		if (some("step.")) this.readStepsSoon();
		if (some("gate.")) this.readGatesSoon();
		if (some("run.child")) this.readTreeSoon();
		if (isNews) this.readSummarySoon();
		this.onChange(events);
	}
}
