// The frame around the pages: session, navigation, keyboard. A page is namePage({main, parts, query, signal}): it is
// built in `main` and may return {escape, onQuery}; `signal` ends its reads, streams, timers and listeners.

import { ApiError, early, get, goBack, keepKey, laterAgain, navigate, poll, rememberScroll, session, setOpener,
	setPageSignal, setTitle, setWaiting, unreachable, watch } from "./api.js";
import { button, count, debounce, dialog, el, errorText, fault, field, fill, heading, icon, input, link, logo,
	plainTable, row, setServerTime, setText, show, skeleton, strong, switchZone, tag, time, toast, zoneName
	} from "./dom.js";
import "./runs.js"; // most visits begin with it

const PAGES = { runs: "Runs", approvals: "Approvals", queues: "Queues", schedules: "Schedules", costs: "Costs",
	workers: "Workers" };
const TITLES = { ...PAGES, compare: "Side by side" };

// --- the frame

const main = el("main.page", { id: "main", tabindex: "-1" });
const banner = el("div.banner", { role: "status", hidden: true });
const badge = el("span.badge", { hidden: true });
const links = Object.entries(PAGES).map(([name, title]) => el("a", { href: `/studio/${name}`, title: `g ${name[0]}` },
	icon(name), el("span", title), name === "approvals" && badge));
const foot = el("div.nav-foot");
const frame = el("div.frame", el("nav.nav", { label: "Studio" },
	el("a.brand", { href: "/studio/runs" }, logo(21), "Tidebase"), el("div.nav-links", links), foot),
el("div", banner, main));

watch.onReachable = (reachable) => {
	if (reachable === banner.hidden) return;
	show(banner, !reachable);
	fill(banner, strong("The server cannot be reached."), " What you see is as of ", time(Date.now(), "short"),
		". Trying again.");
};

// --- opening pages

let page = null; // what the page that is open gave back
let shownPath = null;
let leaving = new AbortController();

async function open(scroll) {
	const url = new URL(location.href);
	const [name, ...parts] = url.pathname.split("/").slice(2).filter(Boolean).map(decodeURIComponent);
	if (!name) return navigate(`/studio/runs${url.search}`, { replace: true });
	if (url.pathname === shownPath && page?.onQuery) return page.onQuery(url.searchParams);
	for (const box of document.querySelectorAll("dialog[open]")) box.close("");
	leaving.abort();
	const { signal } = leaving = new AbortController();
	setPageSignal(signal);
	shownPath = url.pathname;
	page = null;
	const title = TITLES[name];
	for (const anchor of links) {
		if (anchor.pathname === `/studio/${PAGES[name] ? name : "runs"}`) anchor.setAttribute("aria-current", "page");
		else anchor.removeAttribute("aria-current");
	}
	setTitle(title ?? "Not found");
	if (!title) return fill(main, heading("There is no such page"), link("/studio/runs", "All runs"));
	fill(main, skeleton());
	try {
		const kind = name === "runs" && parts.length ? "run" : name;
		const file = { runs: "runs", run: "run", compare: "run", approvals: "approvals" }[kind] ?? "operations";
		const module = await import(`./${file}.js`).catch(() => { throw unreachable(); });
		if (signal.aborted) return; // left before it was there
		const opened = await module[`${kind}Page`]({ main, parts, query: url.searchParams, signal });
		if (signal.aborted) return;
		page = opened;
	} catch (error) {
		if (signal.aborted || error.status === 401) return;
		laterAgain(error);
		fill(main, heading(title), fault(error, openAgain,
			strong(error.status === 404 ? "It does not exist, or no longer" : "This could not be loaded")));
	}
	scrollTo(0, scroll);
	if (!main.contains(document.activeElement)) main.focus({ preventScroll: true });
}

function openAgain() {
	shownPath = null;
	open(0);
}

document.addEventListener("click", (event) => {
	const anchor = event.target.closest?.("a[href^='/studio']");
	if (!anchor || event.defaultPrevented || event.button !== 0) return;
	if (event.metaKey || event.ctrlKey || event.shiftKey) return;
	event.preventDefault();
	navigate(anchor.getAttribute("href"));
});
addEventListener("popstate", (event) => open(event.state?.scroll ?? 0));
addEventListener("scroll", debounce(rememberScroll, 200), { passive: true });
history.scrollRestoration = "manual";
setOpener(open);

// --- keyboard

let goUntil = 0; // after g, the next key is a page's first letter

document.addEventListener("keydown", (event) => {
	const { key, target } = event;
	const inDialog = document.querySelector("dialog[open]");
	if (event.ctrlKey || event.metaKey || event.altKey || event.isComposing) return;
	const typing = target.closest("input:not([type=checkbox], [type=range]), textarea, select");
	if (key === "Escape" && typing && !inDialog) return target.blur();
	if (typing || inDialog || !main.isConnected) return;
	if (Date.now() < goUntil) {
		goUntil = 0;
		const name = Object.keys(PAGES).find((one) => one[0] === key);
		if (name) return navigate(`/studio/${name}`);
	}
	if (key === "g") goUntil = Date.now() + 2000;
	else if (key === "?") showHelp();
	else if (key === "/") {
		event.preventDefault();
		const search = main.querySelector("[data-search]");
		if (search) search.select();
		else navigate("/studio/runs?focus=search");
	} else if (key === "j" || key === "k") moveFocus(target, key === "j" ? 1 : -1);
	else if (key === "x") target.closest("tr")?.querySelector("input[type=checkbox]")?.click();
	else if (key === "Escape" && !page?.escape?.() && location.pathname !== "/studio/runs") goBack();
});

function moveFocus(from, by) {
	const rows = [...main.querySelectorAll("[data-row]")];
	const index = rows.indexOf(from.closest("tr, [role=listitem]")?.querySelector("[data-row]"));
	rows[Math.max(0, Math.min(rows.length - 1, index + by))]?.focus();
}

const KEYS = [["/", "search"], ["j k", "next, previous row"], ["Enter", "open the row"], ["x", "select the row"],
	["Esc", "close, or go back"], ...Object.entries(PAGES).map(([name, title]) => [`g ${name[0]}`, title]),
	["?", "this help"]];
const showHelp = () => dialog("Keyboard", plainTable(KEYS.map(([keys, what]) =>
	[row(keys.split(" ").map((key) => el("kbd", key))), what])));

// --- session

const KEY_GONE = "Your key is no longer the server's.";
let counting = new AbortController(); // how many decisions wait

function signOut() {
	keepKey(null);
	location.assign("/studio");
}

function showSignIn(words = "") {
	leaving.abort();
	counting.abort();
	shownPath = null;
	setTitle("Sign in");
	const typed = input(null, { type: "password", required: true, autocomplete: "current-password" });
	const refused = errorText(words);
	async function signIn(event) {
		event.preventDefault();
		try {
			await get("/session", {}, { key: typed.value, signal: null });
		} catch (error) {
			setText(refused, error.status === 401 ? "That key is not the server's." : error.message);
			return typed.select();
		}
		keepKey(typed.value);
		start();
	}
	fill(document.body, el("main.sign-in", el("form.card", { onsubmit: signIn },
		row(logo(32), el("h1", "Tidebase Studio")),
		field("API key", typed, "TIDEBASE_API_KEY, or TIDEBASE_READ_KEY to look only. This tab keeps it until it is closed."),
		refused, el("button.primary", "Sign in"))));
	typed.focus();
}

async function readSession() {
	const asked = early.session ?? get("/session", {}, { signal: null });
	early.session = null;
	zoneName(); // the browser's first look at time zones takes 30 ms, in which the answer comes
	Object.assign(session, await asked);
	setServerTime(session.now);
}

async function start() {
	if (location.pathname === "/studio/review") return (await import("./approvals.js")).reviewPage(document.body);
	try {
		await readSession();
	} catch (error) {
		early.runs = null; // was refused, too
		if (error.status === 401) return showSignIn(session.key ? KEY_GONE : "");
		fill(document.body, el("main.sign-in", fault(error, null, strong("Tidebase Studio"))));
		return setTimeout(start, 2000);
	}
	fill(foot, session.access === "read" && tag("read only"),
		button([icon("clock"), el("span", { "data-zone": "" }, zoneName())], switchZone, "quiet",
			{ title: "Show times in UTC or in this computer's zone" }),
		button([el("kbd", "?"), "Keyboard"], showHelp, "quiet"), session.key && button("Sign out", signOut, "quiet"));
	fill(document.body, frame);
	counting.abort();
	const { signal } = counting = new AbortController();
	await open(history.state?.scroll ?? 0);
	poll(async () => {
		const answer = await get("/approvals", { limit: 1 }, { signal });
		setWaiting(answer.count);
		show(badge, answer.count > 0);
		setText(badge, count(answer.count, answer.more));
	}, 5000, signal).catch(laterAgain);
}

watch.onUnauthorized = () => main.isConnected && showSignIn(KEY_GONE);
addEventListener("unhandledrejection", (event) => {
	const { reason } = event;
	if (reason?.name === "AbortError" || reason instanceof ApiError) event.preventDefault();
	if (reason instanceof ApiError && reason.status !== 401 && reason.status !== 0) toast(reason.message, "failed");
});
document.addEventListener("visibilitychange", () => { // this computer may have slept: its clock is compared again
	if (!document.hidden && main.isConnected) readSession().catch(laterAgain);
});
start();
