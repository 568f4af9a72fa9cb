// The frame around the pages: session, navigation, keyboard. A page is namePage({main, parts, query, signal}): it is
// built in `main` and may return {escape, onQuery}; `signal` ends its reads, streams, timers and listeners.

import { ApiError, frame, get, getResponse, goBack, KEY, laterAgain, navigate, poll, rememberPlace, session,
	setTitle, setWaiting } from "./api.js";
import { button, count, debounce, dialog, el, errorText, fault, field, fill, heading, icon, input, link, logo,
	plainTable, row, setServerTime, setState, setText, show, skeleton, strong, tag, time, toast, zoneButton
	} from "./dom.js";
import * as runs from "./runs.js"; // most visits begin with it

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
const whole = el("div.frame", el("nav.nav", { label: "Studio" },
	el("a.brand", { href: "/studio/runs" }, logo(21), "Tidebase"), el("div.nav-links", links), foot),
el("div", banner, main));

frame.onReachable = (reachable) => {
	if (reachable === banner.hidden) return;
	show(banner, !reachable);
	if (reachable) return document.dispatchEvent(new Event("reachable"));
	fill(banner, strong("The server cannot be reached."), " What you see is as of ", time(Date.now(), "short"),
		". Trying again.");
};

// --- opening pages

let page = null; // what the page that is open gave back
let shownPath = null;
let leaving = new AbortController();

frame.open = async ({ scroll = 0, row } = {}) => {
	const { pathname, searchParams: query } = new URL(location.href);
	const [name = "runs", ...parts] = pathname.split("/").slice(2).filter(Boolean).map(decodeURIComponent);
	const title = TITLES[name];
	const opened = pathname === shownPath && page;
	if (!opened?.onQuery) {
		for (const box of document.querySelectorAll("dialog[open]")) box.close("");
		leaving.abort();
		leaving = new AbortController();
		frame.signal = leaving.signal;
		shownPath = pathname;
		page = null;
		for (const anchor of links) setState(anchor, "current", anchor.pathname === `/studio/${PAGES[name] ? name : "runs"}`);
		setTitle(title ?? "Not found");
		if (!title) return fill(main, heading("There is no such page"), link("/studio/runs", "All runs"));
		fill(main, heading(title), skeleton());
	}
	const { signal } = leaving;
	try {
		if (opened?.onQuery) await opened.onQuery(query);
		else {
			const kind = name === "runs" && parts.length ? "run" : name;
			const file = { run: "run", compare: "run", approvals: "approvals" }[kind] ?? "operations";
			const module = kind === "runs" ? runs : await load(`/studio/${file}.js`);
			if (signal.aborted) return; // left before it was there
			const built = await module[`${kind}Page`]({ main, parts, query, signal });
			if (signal.aborted) return;
			page = built;
		}
	} catch (error) {
		if (signal.aborted || error.status === 401) return;
		leaving.abort();
		page = null;
		const known = error instanceof ApiError;
		fill(main, heading(title), fault(error, () => (known ? frame.open() : location.reload())));
		if (!known) reportError(error);
	}
	scrollTo(0, scroll);
	if (main.querySelector(":focus")) return;
	(main.querySelector(`[data-key="${CSS.escape(row)}"] [data-row]`) ?? main).focus({ preventScroll: true });
};

/** When a module does not come, its file tells why: the server is away, or has no such file. Else the module does. */
const load = (file) => import(file).catch(async (error) => {
	await getResponse(file);
	throw error;
});

document.addEventListener("click", (event) => {
	const anchor = event.target.closest?.("a[href^='/studio']");
	if (!anchor || event.defaultPrevented || event.button !== 0) return;
	if (event.metaKey || event.ctrlKey || event.shiftKey) return;
	event.preventDefault();
	navigate(anchor.getAttribute("href"));
});
addEventListener("popstate", () => frame.open(history.state ?? {}));
addEventListener("scroll", debounce(rememberPlace, 200), { passive: true });
history.scrollRestoration = "manual";

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
		const search = () => main.querySelector("[data-search]");
		if (search()) search().select();
		else navigate("/studio/runs").then(() => search().select());
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

const signedIn = new AbortController();

function showSignIn() {
	leaving.abort();
	signedIn.abort();
	setTitle("Sign in");
	const typed = input(null, { type: "password", required: true, autocomplete: "current-password" });
	const refused = errorText(session.key ? "Your key is no longer the server's." : "");
	async function signIn(event) {
		event.preventDefault();
		try {
			await get("/session", {}, { key: typed.value, signal: null });
		} catch (error) {
			setText(refused, error.status === 401 ? "That key is not the server's." : error.message);
			return typed.select();
		}
		sessionStorage.setItem(KEY, typed.value);
		location.reload();
	}
	fill(document.body, el("main.sign-in", el("form.card", { onsubmit: signIn },
		row(logo(32), el("h1", "Tidebase Studio")),
		field("API key", typed, "TIDEBASE_API_KEY, or TIDEBASE_READ_KEY to look only. This tab keeps it until it is closed."),
		refused, el("button.primary", "Sign in"))));
	typed.focus();
}

async function readSession() {
	Object.assign(session, await get("/session", {}, { signal: null }));
	setServerTime(session.now);
}

async function start() {
	if (location.pathname === "/studio/review") return (await import("./approvals.js")).reviewPage(document.body);
	try {
		await readSession();
	} catch (error) {
		if (error.status === 401) return showSignIn();
		fill(document.body, el("main.sign-in", fault(error)));
		return setTimeout(start, 2000);
	}
	fill(document.body, whole);
	await frame.open(history.state ?? {});
	fill(foot, session.access === "read" && tag("read only"), zoneButton(), // the first look at time zones takes 30 ms
		button([el("kbd", "?"), "Keyboard"], showHelp, "quiet.keys"),
		session.key && button("Sign out", () => {
			sessionStorage.removeItem(KEY);
			location.assign("/studio");
		}, "quiet"));
	poll(async () => {
		const answer = await get("/approvals", { limit: 1 }, { signal: signedIn.signal });
		setWaiting(answer.count);
		show(badge, answer.count > 0);
		setText(badge, count(answer.count, answer.more));
	}, 5000, signedIn.signal).catch(laterAgain);
}

frame.onUnauthorized = () => main.isConnected && showSignIn();
addEventListener("unhandledrejection", (event) => {
	const { reason } = event;
	if (reason?.name === "AbortError" || reason instanceof ApiError) event.preventDefault();
	if (reason instanceof ApiError && reason.status !== 401 && reason.status !== 0) toast(reason.message, "failed");
});
document.addEventListener("visibilitychange", () => { // this computer may have slept: its clock is compared again
	if (!document.hidden && main.isConnected) readSession().catch(laterAgain);
});
start();
