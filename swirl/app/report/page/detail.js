// One entry: its answers side by side, step by step, and what was drawn at its states as a tree.

const detail = document.getElementById("detail");
const SHADINGS = { none: "none", probability: "probability", change: "change, base to trained" };
let shading = "probability";
let opened = null; // {entry, content}

async function openEntry(entry, answer, step) {
  const details = await part(`chunk-${entry.chunk}`);
  if (opened?.entry.key !== entry.key || LIVE) {
    opened = { entry, content: details[entry.place] };
    drawDetail();
    detail.scrollTop = 0;
    if (matchMedia("(max-width: 760px)").matches) window.scrollTo(0, 0);
  }
  document.querySelectorAll(".step.here").forEach((one) => one.classList.remove("here"));
  const target = step === undefined ? null : document.getElementById(`step-${answer}-${step}`);
  if (target) {
    target.classList.add("here");
    target.scrollIntoView({ block: "start" });
    target.focus({ preventScroll: true });
  }
}

function closeEntry() {
  opened = null;
  detail.replaceChildren(el("p.note", {}, "Choose a trajectory: j and k go through the list, ? tells all keys."));
}

function drawDetail() {
  const { entry, content } = opened;
  const groups = content.groups ?? [], hasChange = content.answers.some((answer) => answer.steps.some((step) => step.other));
  detail.replaceChildren(
    el("button.back", { type: "button", onclick: () => { location.hash = "#/trajectories"; } }, "← all trajectories"),
    el("h2", { tabindex: -1 }, entry.question),
    el("div.meta", {}, el("span", {}, entry.task), el("span", {}, `answer: ${entry.gold ?? NONE}`), ...chipsOf(entry).slice(1),
      entry.runName && multipleRuns() ? el("span", {}, entry.runName) : null,
      el("a", { href: hashOf(entry) }, "link"), el("span.note", {}, entry.id)),
    shadingTools(hasChange),
    el("details", {}, el("summary", {}, "the prompt"), el("pre", {}, content.prompt)),
    el("div.answers", {}, content.answers.map((answer, number) => answerColumn(entry, content, answer, number))),
    groups.length ? el("section", {}, el("h3", {}, "What updates drew at its states"), treesOf(content, groups)) : "");
}

const multipleRuns = () => new Set(entries.map((entry) => entry.run)).size > 1;

function shadingTools(hasChange) {
  const scales = {
    none: [],
    probability: [["", "≥ 90%"], ["p1", "≥ 50%"], ["p2", "≥ 20%"], ["p3", "≥ 5%"], ["p4", "less"]],
    change: [["d3", "≤ −2 nats"], ["d2", "≤ −0.5"], ["d1", "≤ −0.1"], ["", "the same"], ["u1", "≥ 0.1"], ["u2", "≥ 0.5"], ["u3", "≥ 2"]],
  };
  const radios = Object.entries(SHADINGS).map(([name, label]) => el("label", {}, el("input", {
    type: "radio", name: "shading", value: name, checked: name === shading, onchange: () => { shading = name; drawDetail(); },
  }), ` ${label}`));
  return el("div.bar-of-tools", {}, el("fieldset", {}, el("legend", {}, "Shade tokens by"), radios),
    el("span.scale", {}, scales[shading].map(([name, label]) => el(`span${name ? "." + name : ""}`, {}, label))),
    shading === "change" && !hasChange ? el("span.note", {}, `${NONE}: both policies' log-probs are known of some questions alone, and not of this one.`) : null,
    el("output", { id: "token" }, ""));
}

function answerColumn(entry, content, answer, number) {
  const how = answer.stop ? `ended by ${STOPS[answer.stop] ?? answer.stop}` : "";
  return el("div.column", {},
    el("h3", {}, { base: "Base policy", trained: "Trained policy", recorded: "Recorded" }[answer.policy],
      answer.outcome === undefined ? null : rightChip(answer.outcome), el("span.chip", {}, how)),
    el("p.label", {}, `answered: ${answer.prediction ?? NONE}`),
    answer.dropped ? el("p.reason", {}, `Dropped by the filter: ${answer.dropped}`) : null,
    answer.steps.map((step, k) => stepCard(entry, content, answer, number, step, k)));
}

function stepCard(entry, content, answer, number, step, k) {
  const context = el("details", {}, el("summary", {}, "context: all that the model saw before"));
  context.addEventListener("toggle", () => {
    if (context.open && context.children.length === 1) context.append(el("pre", {}, contextOf(content, answer, k)));
  });
  return el("section.step", { id: `step-${number}-${k}`, tabindex: -1, "aria-label": `Step ${k + 1}` },
    el("div.head", {}, el("a", { href: hashOf(entry, number, k), title: "A link to this step" }, `Step ${k + 1}`),
      ...verdictChips(step), // nobody rewards the answers of an evaluation
      entry.kind === "evaluated" ? null : numberChip("reward", step.reward), entry.kind === "evaluated" ? null : numberChip("advantage", step.advantage),
      step.truncated ? el("span.chip.bad", {}, "cut off") : null),
    k > 0 || content.prompt ? context : null,
    el("div.text", {}, tokensOf(step, answer.policy)), tokenNote(step),
    step.reason ? el("p.reason", {}, `Judge: ${step.reason}`) : null,
    step.invalid ? el("p.reason", {}, `Refused by the environment: ${step.invalid}`) : null,
    step.call && step.call[0] !== "answer" ? el("p.label", {}, `${step.call[0]} was asked: ${step.call[1]}`) : null,
    step.observation === undefined ? null : el("pre.observation", {}, step.observation));
}

function verdictChips(step) {
  if (step.verdict) return [el(`span.chip.${step.verdict === "GOOD" ? "good" : "bad"}`, {}, step.verdict)];
  const why = { unreadable: "the judge's answer could not be read", unanswered: "the judge did not answer" }[step.judged];
  return [el("span.chip", {}, why ?? `verdict ${NONE}`)];
}

const numberChip = (name, value) => el("span.chip", {}, `${name} ${value === undefined || value === null ? NONE
  : name === "advantage" ? signed(value, 2) : value.toFixed(2)}`);

function contextOf(content, answer, k) {
  return [content.prompt, ...answer.steps.slice(0, k).flatMap((step) => [step.action, step.observation ?? ""])].join("\n\n");
}

// Log-probs under both policies where both are known, in nats: {own, base, trained}.
function logProbs(step, policy, i) {
  const own = step.log_probs[i] / 1000, other = step.other ? step.other[i] / 1000 : null;
  return policy === "base" ? { own, base: own, trained: other } : policy === "trained" ? { own, base: other, trained: own } : { own, base: null, trained: null };
}

function tokensOf(step, policy) {
  if (!step.pieces) return [step.action];
  let at = 0;
  return step.pieces.map((length, i) => {
    const text = step.action.slice(at, at + length), known = logProbs(step, policy, i);
    at += length;
    const told = toldOf(text, known);
    return el(`span.token${shadeOf(known)}`, { title: told, onclick: () => { document.getElementById("token").textContent = told; } },
      length ? text : "⏎");
  });
}

function shadeOf({ own, base, trained }) {
  if (shading === "probability") {
    const p = Math.exp(own);
    return p >= 0.9 ? "" : p >= 0.5 ? ".p1" : p >= 0.2 ? ".p2" : p >= 0.05 ? ".p3" : ".p4";
  }
  if (shading === "change" && base !== null && trained !== null) {
    const change = trained - base, size = Math.abs(change);
    return size < 0.1 ? "" : `.${change > 0 ? "u" : "d"}${size >= 2 ? 3 : size >= 0.5 ? 2 : 1}`;
  }
  return "";
}

function toldOf(text, { own, base, trained }) {
  const one = `“${text || "end of turn"}”: log-prob ${fixed(own, 3)} (${(100 * Math.exp(own)).toFixed(1)}%)`;
  return base === null || trained === null ? one
    : `${one}; base ${fixed(base, 3)}, trained ${fixed(trained, 3)}: ${signed(trained - base, 3)}`;
}

function tokenNote(step) {
  if (!step.log_probs?.length) return null;
  const sum = step.log_probs.reduce((total, value) => total + value, 0) / 1000, lowest = Math.min(...step.log_probs) / 1000;
  return el("p.label", {}, `${step.log_probs.length} tokens, log-prob ${fixed(sum)}, lowest ${fixed(lowest)}`);
}

// The draws of each update as a tree: what was recorded is the trunk, draws branch off at its states; draws of the same
// text are one branch.
function treesOf(content, groups) {
  const updates = [...new Set(groups.map((group) => group.update))].sort((a, b) => a - b);
  return updates.map((update, place) => {
    const own = groups.filter((group) => group.update === update);
    return el("details", { open: place === 0 }, el("summary", {}, `update ${update}: ${own.reduce((sum, group) => sum + group.attempts.length, 0)} draws at ${own.length} states`),
      el("ul.tree", {}, content.answers.length ? trunk(content.answers[0].steps, own, 0) : own.flatMap((group) => branches(group.attempts, 0))));
  });
}

function trunk(steps, groups, k) {
  const here = groups.filter((group) => group.k === k).flatMap((group) => branches(group.attempts, 0));
  if (k >= steps.length) return here;
  const later = k + 1 < steps.length ? el("ul", {}, trunk(steps, groups, k + 1)) : null;
  return [...here, el("li.trunk", {}, branchLine(steps[k], [`recorded, step ${k + 1}`], "recorded"), later)];
}

function branches(attempts, depth) {
  const same = new Map();
  for (const attempt of attempts) {
    const step = attempt.steps[depth];
    if (!step) continue;
    if (!same.has(step.action)) same.set(step.action, []);
    same.get(step.action).push(attempt);
  }
  return [...same.values()].map((alike) => {
    const last = alike.filter((attempt) => attempt.steps.length === depth + 1), step = alike[0].steps[depth];
    const words = [`${alike.length} ×`];
    if (last.length) words.push(`reward ${last[0].steps[depth].reward?.toFixed(2) ?? NONE}`, `advantage ${last[0].advantage === null || last[0].advantage === undefined ? NONE : signed(last[0].advantage, 2)}`);
    const later = branches(alike, depth + 1);
    return el("li", {}, branchLine(step, words, "recorded", last[0]?.advantage), later.length ? el("ul", {}, later) : null);
  });
}

function branchLine(step, words, policy, advantage) {
  const kind = advantage > 0 ? ".good" : advantage < 0 ? ".bad" : "";
  return el("details", {}, el("summary", {}, el(`span.chip${kind}`, {}, words.join(" · ")), el("span.said", {}, step.action.length > 90 ? step.action.slice(0, 90) + "…" : step.action)),
    el("div.text", {}, tokensOf(step, policy)), tokenNote(step),
    step.reason ? el("p.reason", {}, `Judge: ${step.reason}`) : null,
    step.invalid ? el("p.reason", {}, `Refused by the environment: ${step.invalid}`) : null,
    step.observation === undefined ? null : el("pre.observation", {}, step.observation));
}
