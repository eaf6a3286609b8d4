// The list of trajectories: search, filters, and only the rows that are in sight.

const ROW = 66; // pixels, as in style.css
const KINDS = { evaluated: "test question", "training data": "training data", played: "played by an update" };
const STOPS = { answer: "an answer", step_limit: "the step limit", invalid_action: "an invalid action", context_limit: "the context's end" };

// name, what it filters, and of an entry the value, null where it has none.
const FILTERS = [
  ["run", "Every run", (entry) => entry.runName],
  ["kind", "Every kind", (entry) => KINDS[entry.kind]],
  ["task", "Every family", (entry) => entry.task],
  ["change", "Changed or not", (entry) => entry.change ?? null],
  ["outcome", "Right or wrong", (entry) => ({ true: "right", false: "wrong" })[entry.outcome] ?? null],
  ["verdict", "Every verdict", (entry) => ({ GOOD: "every step GOOD", BAD: "some step BAD" })[entry.verdict] ?? "not all steps judged"],
  ["stop", "Every ending", (entry) => (entry.stop ? `ended by ${STOPS[entry.stop] ?? entry.stop}` : null)],
  ["kept", "Kept or dropped", (entry) => ({ true: "kept by the filter", false: "dropped by the filter" })[entry.kept] ?? null],
  ["branches", "With or without samples", (entry) => (entry.branches ? "with sampled actions" : null)],
];

let entries = [], byKey = null, found = [], chosen = -1, inSteps = [];
const list = document.getElementById("list"), rows = document.getElementById("rows");
const search = document.getElementById("search"), selects = document.getElementById("selects");

function takeEntries(index, overview) {
  const { columns } = index, names = Object.keys(columns);
  entries = Array.from({ length: index.count }, (_, number) => {
    const entry = { number, chunk: Math.floor(number / index.per_chunk), place: number % index.per_chunk };
    for (const name of names) entry[name] = columns[name][number];
    entry.runName = overview.runs[entry.run].name;
    return entry;
  });
  byKey = null;
  inSteps = [];
}

// What only the list needs, when it is first looked at.
function prepareList() {
  if (byKey) return;
  for (const entry of entries) {
    entry.key = keyOf(entry);
    entry.text = [entry.question, entry.gold, ...entry.predictions, entry.id].filter((text) => text).join("\n").toLowerCase();
  }
  byKey = new Map(entries.map((entry) => [entry.key, entry]));
  drawFilters();
  applyFilters();
}

const keyOf = (entry) => [entry.run, entry.kind[0], entry.task, entry.id].map(encodeURIComponent).join("/");
const hashOf = (entry, answer, step) => `#/t/${keyOf(entry)}` + (step === undefined ? "" : `/${answer}/${step}`);

function drawFilters() {
  const was = Object.fromEntries([...selects.children].map((select) => [select.name, select.value]));
  selects.replaceChildren();
  for (const [name, title, valueOf] of FILTERS) {
    const counts = new Map();
    for (const entry of entries) {
      const value = valueOf(entry);
      if (value !== null) counts.set(value, (counts.get(value) ?? 0) + 1);
    }
    if (!counts.size || (counts.size === 1 && counts.values().next().value === entries.length)) continue;
    const options = [...counts].sort(([a], [b]) => (a < b ? -1 : 1));
    const select = el("select", { name, "aria-label": title, onchange: applyFilters }, el("option", { value: "" }, title),
      options.map(([value, count]) => el("option", { value }, `${value} (${count.toLocaleString("en")})`)));
    if (was[name]) select.value = was[name];
    selects.append(select);
  }
}

function showChanged(change) {
  prepareList();
  document.getElementById("filters").reset();
  const select = selects.querySelector("[name=change]");
  if (select) select.value = change;
  applyFilters();
}

function applyFilters() {
  const kept = chosen >= 0 ? found[chosen] : null;
  const wanted = [...selects.children].filter((select) => select.value).map((select) => {
    const [, , valueOf] = FILTERS.find(([name]) => name === select.name);
    return (entry) => valueOf(entry) === select.value;
  });
  for (const select of selects.children) select.classList.toggle("set", select.value !== "");
  const words = search.value.toLowerCase().split(/\s+/).filter((word) => word);
  found = entries.filter((entry) => wanted.every((holds) => holds(entry)) &&
    words.every((word) => entry.text.includes(word) || (inSteps[entry.number] ?? "").includes(word)));
  document.getElementById("count").textContent = `${found.length.toLocaleString("en")} of ${entries.length.toLocaleString("en")}`;
  rows.style.height = `${found.length * ROW}px`;
  chosen = kept ? found.indexOf(kept) : -1;
  if (chosen < 0) list.scrollTop = 0;
  drawRows();
}

function drawRows() {
  const first = Math.max(0, Math.floor(list.scrollTop / ROW) - 6);
  const last = Math.min(found.length, Math.ceil((list.scrollTop + list.clientHeight) / ROW) + 6);
  rows.replaceChildren(...found.slice(first, last).map((entry, i) => rowOf(entry, first + i)));
  if (chosen >= first && chosen < last) list.setAttribute("aria-activedescendant", `row-${chosen}`);
  else list.removeAttribute("aria-activedescendant");
}

function rowOf(entry, at) {
  const row = el("div.row", { id: `row-${at}`, role: "option", "aria-selected": String(at === chosen), "aria-posinset": at + 1,
    "aria-setsize": found.length, onclick: () => { choose(at); openChosen(); } },
  el("div", {}, entry.question), el("div.under", {}, ...chipsOf(entry)), el("div.under", {}, predictionsOf(entry)));
  row.style.top = `${at * ROW}px`;
  return row;
}

function chipsOf(entry) {
  const made = [el("span", {}, `${entry.task} `)];
  if (entry.change) made.push(el(`span.chip${{ mended: ".good", broken: ".bad" }[entry.change] ?? ""}`, {}, entry.change), " ");
  else if (entry.outcome !== null && entry.outcome !== undefined) made.push(rightChip(entry.outcome), " ");
  if (entry.kept !== null && entry.kept !== undefined) made.push(el(`span.chip`, {}, entry.kept ? "kept" : "dropped"), " ");
  if (entry.verdict === "BAD") made.push(el("span.chip.bad", {}, "a BAD step"), " ");
  if (entry.branches) made.push(el("span.chip", {}, "samples"), " ");
  return made;
}

const rightChip = (right) => el(`span.chip.${right ? "good" : "bad"}`, {}, right ? "right" : "wrong");
const predictionsOf = (entry) => (entry.predictions.length ? entry.predictions.map((text) => text ?? "no answer").join(" → ") : entry.id);

function choose(at) {
  if (!found.length) return;
  chosen = Math.max(0, Math.min(found.length - 1, at));
  if (chosen * ROW < list.scrollTop) list.scrollTop = chosen * ROW;
  else if ((chosen + 1) * ROW > list.scrollTop + list.clientHeight) list.scrollTop = (chosen + 1) * ROW - list.clientHeight;
  drawRows();
}

function openChosen() {
  if (chosen >= 0) location.hash = hashOf(found[chosen]);
}

// The texts of all steps become searchable bit by bit, while nobody waits for them.
async function readAllSteps(index) {
  const of = index;
  for (let chunk = 0; chunk * index.per_chunk < index.count; chunk++) {
    await new Promise((done) => (window.requestIdleCallback ? requestIdleCallback(done, { timeout: 100 }) : setTimeout(done)));
    const details = LIVE ? await fetched(`chunk-${chunk}`) : await unpacked(document.getElementById(`part-chunk-${chunk}`).textContent);
    if (of.count !== entries.length) return; // another index has come meanwhile
    details.forEach((detail, place) => {
      const steps = detail.answers.flatMap((answer) => answer.steps);
      inSteps[chunk * index.per_chunk + place] = steps.map((step) => `${step.action}\n${step.observation ?? ""}\n${step.reason ?? ""}`).join("\n").toLowerCase();
    });
  }
  if (search.value) applyFilters();
}
