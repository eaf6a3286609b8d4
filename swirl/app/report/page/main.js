// Views, keys, theme, and what happens when a run that is shown live goes on.

const KEYS = [["j, k", "next, previous trajectory"], ["Enter", "open it"], ["Escape", "back"], ["/", "search"], ["o, t", "overview, trajectories"],
  ["s", "shade tokens in another way"], ["d", "light or dark"], ["?", "these keys"]];
let overview = null, index = null, known = null, curvesAreStale = true, stepsAreRead = false;

function route() {
  const [, view, ...words] = location.hash.split("/");
  const inTrajectories = view === "trajectories" || view === "t";
  document.getElementById("overview").hidden = inTrajectories;
  const trajectories = document.getElementById("trajectories");
  trajectories.hidden = !inTrajectories;
  for (const link of document.querySelectorAll("header nav a")) {
    if ((link.dataset.view === "trajectories") === inTrajectories) link.setAttribute("aria-current", "page");
    else link.removeAttribute("aria-current");
  }
  trajectories.classList.toggle("reading", view === "t");
  if (inTrajectories) prepareList();
  else if (curvesAreStale) {
    drawCurves(overview);
    curvesAreStale = false;
  }
  if (view === "t") {
    const entry = byKey.get(words.slice(0, 4).join("/"));
    if (!entry) {
      opened = null;
      detail.replaceChildren(el("p.note", {}, "No trajectory of that name is in this report."));
      return;
    }
    if (found.indexOf(entry) < 0) {
      document.getElementById("filters").reset();
      applyFilters();
    }
    choose(found.indexOf(entry));
    openEntry(entry, words[4], words[5]).catch(fail);
  } else if (inTrajectories) {
    closeEntry();
    drawRows();
  }
}

function fail(error) {
  const line = document.getElementById("failure");
  line.hidden = false;
  line.textContent = `This report cannot be shown: ${error.message ?? error}`;
}

function go(by) {
  const reading = location.hash.startsWith("#/t/");
  if (!location.hash.startsWith("#/t")) location.hash = "#/trajectories";
  choose(chosen + by);
  if (reading || matchMedia("(min-width: 761px)").matches) openChosen();
}

function onKey(event) {
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  const keys = document.getElementById("keys"), typing = event.target.matches("input[type=search], select");
  if (event.key === "Escape" && !keys.open) {
    if (typing) event.target.blur();
    else if (location.hash.startsWith("#/t/")) location.hash = "#/trajectories";
    else location.hash = "#/";
    if (!typing) list.focus();
    return;
  }
  if (typing || keys.open) return;
  const does = {
    j: () => go(1), k: () => go(-1), "/": () => { location.hash = "#/trajectories"; setTimeout(() => search.focus()); },
    o: () => { location.hash = "#/"; }, t: () => { location.hash = "#/trajectories"; },
    s: nextShading, d: toggleTheme, "?": () => keys.showModal(),
    Enter: () => { if (event.target === list || event.target === document.body) openChosen(); },
    ArrowDown: () => { if (event.target === list) go(1); }, ArrowUp: () => { if (event.target === list) go(-1); },
  }[event.key];
  if (!does || (event.key.startsWith("Arrow") && event.target !== list)) return;
  if (event.key !== "Enter") event.preventDefault();
  does();
}

function nextShading() {
  const names = Object.keys(SHADINGS);
  shading = names[(names.indexOf(shading) + 1) % names.length];
  if (opened) drawDetail();
}

const remembered = { get: () => { try { return localStorage.getItem("swirl-theme"); } catch { return null; } },
  set: (value) => { try { localStorage.setItem("swirl-theme", value); } catch { /* a file's page may have no storage */ } } };

function toggleTheme() {
  remembered.set((document.documentElement.dataset.theme = theme() === "dark" ? "light" : "dark"));
  recolour();
}

function recolour() {
  if (overview) drawOverview(overview, entries);
  if (overview && !document.getElementById("overview").hidden) drawCurves(overview);
  else curvesAreStale = true;
}

async function load() {
  if (LIVE) known = await fetched("version"); // before the parts, so that none can be older than what is known
  [overview, index] = await Promise.all([part("overview"), part("index")]);
  takeEntries(index, overview);
  drawOverview(overview, entries);
  curvesAreStale = true;
  route();
}

async function readSteps() {
  if (stepsAreRead) return;
  stepsAreRead = true;
  await readAllSteps(index);
  document.documentElement.dataset.searchable = "yes";
}

// A run that is shown live: what has changed is asked for again; where one reads, it stays.
async function watch() {
  const live = document.getElementById("live");
  for (;;) {
    try {
      const version = await fetched("version");
      if (version.overview !== known.overview) {
        forget((name) => name === "overview");
        overview = await part("overview");
        recolour();
      }
      if (version.entries !== known.entries) {
        forget((name) => name !== "overview");
        stepsAreRead = false;
        index = await part("index");
        takeEntries(index, overview);
        drawOverview(overview, entries);
        route();
      }
      known = version;
      live.textContent = `live, ${version.at}`;
    } catch (error) {
      live.textContent = `not reachable (${error.message})`;
    }
    await new Promise((done) => setTimeout(done, 2000));
  }
}

function begin() {
  const chosenTheme = remembered.get();
  if (chosenTheme === "light" || chosenTheme === "dark") document.documentElement.dataset.theme = chosenTheme;
  document.querySelector("#keys dl").append(...KEYS.flatMap(([keys, what]) => [el("dt", {}, el("kbd", {}, keys)), el("dd", {}, what)]));
  document.getElementById("theme").addEventListener("click", toggleTheme);
  document.getElementById("help").addEventListener("click", () => document.getElementById("keys").showModal());
  document.getElementById("filters").addEventListener("submit", (event) => event.preventDefault());
  document.getElementById("filters").addEventListener("reset", () => setTimeout(applyFilters));
  search.addEventListener("input", applyFilters);
  search.addEventListener("focus", () => readSteps().catch(fail));
  list.addEventListener("scroll", drawRows, { passive: true });
  systemTheme.addEventListener("change", recolour);
  addEventListener("hashchange", route);
  addEventListener("keydown", onKey);
  new ResizeObserver(() => { resizeCharts(); drawRows(); }).observe(document.getElementById("main"));
  load().then(() => requestAnimationFrame(() => setTimeout(() => { // the first view is on the screen
    performance.mark("ready");
    document.documentElement.dataset.ready = "yes";
    if (LIVE) watch();
  })), fail);
}

begin();
