// Tidebase Studio: the frame around the pages. Session, navigation, keyboard, and what all pages share.
//
// A page is a module with open(context) -> {keys?, onQuery?} | nothing. context: main (where it builds itself), parts (of
// the path), query, signal (aborted when the page is left: it ends requests, streams, timers and listeners).

import { ApiError, get, keepKey, onConnection, poll, session, setUnauthorized } from "./api.js";
import { dialog, el, fill, icon, setServerTime, setText, show, shortTime, skeleton, switchZone, toast, zoneName }
  from "./dom.js";
import { navigate, rememberScroll, setOpener, setTitle, setWaiting } from "./router.js";

const PAGES = {
  runs: { title: "Runs", key: "r", load: (parts) => (parts.length ? import("./run.js") : import("./runs.js")) },
  approvals: { title: "Approvals", key: "a", load: () => import("./approvals.js") },
  queues: { title: "Queues", key: "q", load: () => import("./queues.js") },
  schedules: { title: "Schedules", key: "s", load: () => import("./schedules.js") },
  costs: { title: "Costs", key: "c", load: () => import("./costs.js") },
  workers: { title: "Workers", key: "w", load: () => import("./workers.js") },
  compare: { title: "Compare", load: () => import("./compare.js"), section: "runs" },
};

const main = el("main.page", { id: "main", tabindex: "-1" });
let page = null; // what the page that is open gave back
let shownPath = null;
let leaving = new AbortController();

// --- opening pages

async function open({ restore }) {
  const url = new URL(location.href);
  const [name = "", ...parts] = url.pathname.split("/").slice(2).filter(Boolean).map(decodeURIComponent);
  if (!name) return navigate("/studio/runs", { replace: true });
  if (url.pathname === shownPath && page?.onQuery) return page.onQuery(url.searchParams);

  for (const box of document.querySelectorAll("dialog[open]")) box.close("");
  leaving.abort();
  const { signal } = leaving = new AbortController();
  shownPath = url.pathname;
  page = null;
  const entry = PAGES[name];
  for (const link of document.querySelectorAll(".nav-links a")) {
    if (link.dataset.page === (entry?.section ?? name)) link.setAttribute("aria-current", "page");
    else link.removeAttribute("aria-current");
  }
  if (!entry) {
    setTitle("Not found");
    return fill(main, el("h1", "There is no such page"), el("a.link", { href: "/studio/runs" }, "All runs"));
  }
  setTitle(entry.title);
  fill(main, skeleton());
  try {
    const module = await entry.load(parts);
    if (signal.aborted) return;
    page = await module.open({ main, parts, query: url.searchParams, signal });
  } catch (error) {
    if (signal.aborted || error.name === "AbortError") return;
    showFault(error, entry.title);
    if (!(error instanceof ApiError)) throw error;
  }
  if (signal.aborted) return;
  scrollTo(0, restore);
  if (!main.contains(document.activeElement)) main.focus({ preventScroll: true });
}

function showFault(error, title) {
  if (error.status === 401) return;
  fill(main, el("h1", title), el("div.fault", { role: "alert" },
    el("strong", error.status === 404 ? "It does not exist, or no longer" : "This could not be loaded"),
    el("p", error.message),
    el("button", { onclick: () => { shownPath = null; open({ restore: 0 }); } }, "Try again")));
}

document.addEventListener("click", (event) => {
  const link = event.target.closest?.("a[href^='/studio']");
  if (!link || event.defaultPrevented || event.button !== 0 || event.metaKey || event.ctrlKey || event.shiftKey) return;
  if (link.target || link.hasAttribute("download")) return;
  event.preventDefault();
  navigate(link.getAttribute("href"));
});
addEventListener("popstate", (event) => open({ restore: event.state?.scroll ?? 0 }));
let scrolled;
addEventListener("scroll", () => {
  clearTimeout(scrolled);
  scrolled = setTimeout(rememberScroll, 200);
}, { passive: true });
history.scrollRestoration = "manual";
setOpener(open);

// --- keyboard

let goUntil = 0; // after g, the next key names a page

document.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey || event.isComposing) return;
  const typing = event.target.closest("input:not([type=checkbox], [type=radio], [type=range]), textarea, select");
  if (event.key === "Escape" && typing && !document.querySelector("dialog[open]")) return event.target.blur();
  if (typing || document.querySelector("dialog[open]") || !main.isConnected) return;
  if (Date.now() < goUntil) {
    goUntil = 0;
    const [name] = Object.entries(PAGES).find(([, entry]) => entry.key === event.key) ?? [];
    if (name) {
      event.preventDefault();
      return navigate(`/studio/${name}`);
    }
  }
  const onControl = event.target.closest("button, a, summary, input");
  if (event.key === "g") goUntil = Date.now() + 1500;
  else if (event.key === "?") showHelp();
  else if (event.key === "/") search(event);
  else if (event.key === "Escape") {
    if (!page?.keys?.("Escape")) history.length > 1 && location.pathname !== "/studio/runs" && history.back();
  } else if (!(event.key === "Enter" && onControl) && page?.keys?.(event.key)) event.preventDefault();
});

function search(event) {
  event.preventDefault();
  const input = main.querySelector("[data-search]");
  if (input) {
    input.focus();
    input.select();
  } else navigate("/studio/runs?focus=search");
}

function showHelp() {
  const keys = [["/", "search"], ["j  k", "next, previous row"], ["Enter", "open the row"], ["x", "select the row"],
    ["Esc", "close, or go back"], ["g r", "runs"], ["g a", "approvals"], ["g q", "queues"], ["g s", "schedules"],
    ["g c", "costs"], ["g w", "workers"], ["?", "this help"]];
  dialog("Keyboard", el("table", el("tbody", keys.map(([key, what]) =>
    el("tr", el("td", key.split("  ").flatMap((one) => [el("kbd", one), " "])), el("td", what))))));
}

// --- the frame

const banner = el("div.banner", { role: "status", hidden: true });
const badge = el("span.badge", { hidden: true });
let readApprovals = () => {};
let countingApprovals = new AbortController();

function buildFrame() {
  const links = Object.entries(PAGES).filter(([, entry]) => entry.key).map(([name, entry]) =>
    el("a", { href: `/studio/${name}`, "data-page": name, title: `${entry.title} (g ${entry.key})` },
      icon(name), el("span", entry.title), name === "approvals" && badge));
  fill(document.body,
    el("a.skip", { href: "#main", onclick: () => main.focus() }, "Skip to the content"),
    el("div.frame",
      el("nav.nav", { "aria-label": "Studio" },
        el("a.brand", { href: "/studio/runs" }, el("img", { src: "/studio/icon.svg", alt: "" }), "Tidebase"),
        el("div.nav-links", links),
        el("div.nav-foot",
          session.access === "read" && el("span.tag", { title: "Signed in with TIDEBASE_READ_KEY" }, "read only"),
          el("button", { class: "quiet", title: "Show times in UTC or in this computer's zone", onclick: switchZone },
            icon("clock"), el("span", { "data-zone": "" }, zoneName())),
          el("button", { class: "quiet", onclick: showHelp }, el("kbd", "?"), "Keyboard"),
          session.key && el("button", { class: "quiet", onclick: signOut }, "Sign out"))),
      el("div", banner, main)));
}

function showConnection({ reachable, since }) {
  show(banner, !reachable);
  if (!reachable) {
    fill(banner, el("strong", "The server cannot be reached."),
      `What you see is from ${shortTime(new Date(since).toISOString())}. Trying again.`);
  }
}

// --- session

async function startSession() {
  Object.assign(session, await get("/session"));
  setServerTime(session.now);
}

function signOut() {
  keepKey(null);
  location.assign("/studio");
}

function showSignIn(words = "") {
  leaving.abort();
  shownPath = null;
  setTitle("Sign in");
  const input = el("input", { type: "password", name: "key", required: true, autocomplete: "current-password",
    "aria-describedby": "sign-in-error" });
  const fault = el("p.error-text", { id: "sign-in-error", role: "alert" }, words);
  const form = el("form.card", { async onsubmit(event) {
    event.preventDefault();
    try {
      await get("/session", { key: input.value });
    } catch (error) {
      setText(fault, error.status === 401 ? "That key is not the server's." : error.message);
      return input.select();
    }
    keepKey(input.value);
    start();
  } },
  el("div.row", el("img", { src: "/studio/icon.svg", alt: "", width: 32, height: 32 }), el("h1", "Tidebase Studio")),
  el("label.field", el("span", "API key"), input,
    el("small", "TIDEBASE_API_KEY, or TIDEBASE_READ_KEY to look only. It is kept in this tab until you close it.")),
  fault,
  el("button.primary", "Sign in"));
  fill(document.body, el("main.sign-in", form));
  input.focus();
}

async function start() {
  if (location.pathname === "/studio/review") {
    const { openReview } = await import("./approvals.js");
    return openReview(document.body);
  }
  try {
    await startSession();
  } catch (error) {
    if (error.status === 401) return showSignIn(session.key ? "Your key is no longer the server's." : "");
    fill(document.body, el("main.sign-in", main));
    setTimeout(start, 2000);
    return showFault(error, "Tidebase Studio");
  }
  buildFrame();
  countingApprovals.abort();
  countingApprovals = new AbortController();
  readApprovals = poll(async (signal) => {
    const { count, more } = await get("/approvals?limit=1", { signal });
    setWaiting(count);
    show(badge, count > 0);
    setText(badge, more ? `${count}+` : count);
  }, 5000, countingApprovals.signal);
  readApprovals();
  await open({ restore: history.state?.scroll ?? 0 });
}

setUnauthorized(() => {
  if (main.isConnected) showSignIn("Your key is no longer the server's.");
});
onConnection(showConnection);
addEventListener("unhandledrejection", (event) => {
  if (event.reason?.name === "AbortError") event.preventDefault();
  else if (event.reason instanceof ApiError) {
    event.preventDefault();
    if (event.reason.status !== 401 && event.reason.status !== 0) toast(event.reason.message, "error");
  }
});
document.addEventListener("decided", () => readApprovals()); // an approval was decided here: the count is another
document.addEventListener("visibilitychange", () => {
  if (!document.hidden && main.isConnected) startSession().catch(() => {}); // the computer may have slept
});
start();
