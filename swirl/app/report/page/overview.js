// The first view: how the runs ended, what training changed, the table, the filter, the settings.

function drawOverview(overview, entries) {
  replace("runs", overview.runs.map(runLine));
  replace("changed", changedLists(overview, entries));
  replace("table", [beforeAndAfter(overview)]);
  replace("funnel", overview.runs.map((run) => funnelOf(run, overview.runs.length > 1)));
  replace("settings", overview.runs.map(settingsOf));
}

const replace = (id, children) => document.getElementById(id).replaceChildren(...children);

function runLine(run, number, runs) {
  const kind = { finished: "good", running: "", stopped: "bad" }[run.status.kind];
  const settings = Object.entries(run.settings).map(([name, value]) => `${name} ${value}`).join(", ");
  return el("div.run", {},
    el("h2", { id: `run-${number}` }, runs.length > 1 ? swatch(colour(number)) : null, run.name),
    el(`span.chip${kind ? "." + kind : ""}`, {}, run.status.text),
    settings ? el("span.note", {}, settings) : null,
    el("dl", {}, run.facts.map(([name, value]) => el("div", {}, el("dt", {}, name), el("dd", {}, value)))),
    run.notes.length ? el("p.note", {}, `Here: ${run.notes.join("; ")}.`) : null);
}

function swatch(of) {
  const made = el("span.swatch", { "aria-hidden": "true" });
  made.style.background = of;
  return made;
}

const OPENS_WITH = 10;

// Ten questions that training mended, ten that it broke: the families in turn, so that none hides another.
function changedLists(overview, entries) {
  const titles = { mended: "Mended by training", broken: "Broken by training" };
  if (!overview.runs.some((run) => Object.keys(run.changes).length)) {
    return [el("div", {}, el("h2", {}, "What training changed"),
      el("p.note", {}, `${NONE}: no question was answered both before and after training, so nothing can be compared yet.`))];
  }
  return Object.entries(titles).map(([change, title]) => {
    const all = entries.filter((entry) => entry.change === change);
    const count = overview.runs.reduce((sum, run) => sum + (run.changes[change] ?? 0), 0);
    const items = inTurn(all).slice(0, OPENS_WITH).map((entry) => el("li", {}, el("a", { href: hashOf(entry) },
      el("span", {}, entry.question),
      el("span.answers", {}, `${entry.task}: ${entry.predictions[0] ?? NONE} → ${entry.predictions[1] ?? NONE}` +
        (change === "broken" && entry.gold !== null ? ` (right: ${entry.gold})` : "")))));
    const more = all.length > items.length
      ? el("p", {}, el("a", { href: "#/trajectories", onclick: () => showChanged(change) }, `all ${all.length}`)) : null;
    return el("section", {}, el("h2", {}, `${title} (${count})`),
      items.length ? el("ol", {}, items) : count ? null : el("p.note", {}, "none"), more,
      count > all.length ? el("p.note", {}, `${count - all.length} are left out of this page (--trajectories)`) : null);
  });
}

function inTurn(entries) {
  const families = new Map();
  for (const entry of entries) {
    const key = `${entry.run}/${entry.task}`;
    if (!families.has(key)) families.set(key, []);
    families.get(key).push(entry);
  }
  const queues = [...families.values()], made = [];
  for (let turn = 0; made.length < entries.length; turn++) {
    for (const queue of queues) if (turn < queue.length) made.push(queue[turn]);
  }
  return made;
}

const interval = (pair) => (pair ? el("small", {}, ` [${(100 * pair[0]).toFixed(0)}, ${(100 * pair[1]).toFixed(0)}]`) : null);

function beforeAndAfter(overview) {
  const several = overview.runs.length > 1, rows = [];
  const tasks = [...new Set(overview.runs.flatMap((run) => run.table.map((row) => row.task)))];
  for (const task of tasks) {
    overview.runs.forEach((run, number) => {
      const row = run.table.find((one) => one.task === task);
      if (row) rows.push(tableRow(row, several ? el("td", {}, swatch(colour(number)), run.name) : null));
    });
  }
  if (!rows.length) return el("p.note", {}, `${NONE}: this run has no answers to test questions.`);
  const heads = ["family", several ? "run" : null, "questions", "before", "after", "change, points", "relative", "GOOD steps before", "after"];
  return el("div", {}, el("table", {},
    el("thead", {}, el("tr", {}, heads.filter((head) => head).map((head) => el("th", { scope: "col" }, head)))),
    el("tbody", {}, rows)),
  el("p.note", {}, "Accuracy of greedy answers; in brackets 95% intervals by bootstrap over questions, of the change over the same questions' differences."));
}

function tableRow(row, run) {
  return el("tr", {}, el("td", {}, row.task), run,
    el("td", {}, row.questions === null ? NONE : String(row.questions)),
    el("td", {}, percent(row.accuracy.before), interval(row.interval.before)),
    el("td", {}, percent(row.accuracy.after), interval(row.interval.after)),
    el("td", {}, row.change === null ? NONE : signed(100 * row.change), interval(row.change_interval)),
    el("td", {}, row.relative_gain === null ? NONE : `${signed(100 * row.relative_gain, 0)}%`),
    el("td", {}, percent(row.good_steps.before)), el("td", {}, percent(row.good_steps.after)));
}

function funnelOf(run, named) {
  const most = Math.max(...run.funnel.map((stage) => stage.count ?? 0), 1);
  const rows = run.funnel.flatMap((stage) => {
    const bar = el(`div.bar${stage.dropped ? ".dropped" : ""}`);
    bar.style.width = `${(100 * (stage.count ?? 0)) / most}%`;
    const share = stage.count === null ? NONE : `${stage.count.toLocaleString("en")} (${((100 * stage.count) / most).toFixed(0)}%)`;
    return [el("span", {}, stage.label), el("div.track", { "aria-hidden": "true" }, bar), el("span", {}, share)];
  });
  return el("div", {}, named ? el("h3", {}, run.name) : null,
    rows.length ? el("div.funnel", {}, rows) : el("p.note", {}, `${NONE}: this run made and filtered no trajectories of its own.`));
}

function settingsOf(run) {
  const all = Object.entries(run.config);
  return el("details", {}, el("summary", {}, `${run.name}: ${all.length} settings`),
    el("dl.settings", {}, all.map(([name, value]) => el("div", {}, el("dt", {}, name), el("dd", {}, value)))));
}
