// The learning curves, drawn by uPlot: a line a run, or of scores a line a family; runs of one experiment as a mean
// with its interval.

const SMOOTHED_OVER = 9;
const HEIGHT = 190;
let charts = [], seen = null; // drawn as they come into sight
const hiddenLines = new Set();

function drawCurves(overview) {
  for (const chart of charts) chart.destroy();
  charts = [];
  const curves = overview.curves.filter((curve) => linesOf(curve, overview).length);
  const missing = overview.curves.filter((curve) => !linesOf(curve, overview).length).map((curve) => curve.title.toLowerCase());
  replace("legend", overview.runs.length > 1 ? legendOf(overview) : []);
  replace("curves", curves.map((curve) => el("figure", {},
    el("figcaption", {}, curve.title, curve.unit ? el("small", {}, ` ${curve.unit}`) : null), el("div.plot"))));
  seen?.disconnect();
  seen = new IntersectionObserver((changes) => {
    for (const { target, isIntersecting } of changes) {
      if (!isIntersecting) continue;
      seen.unobserve(target);
      const curve = curves[[...holders].indexOf(target)];
      charts.push(plot(target, curve, linesOf(curve, overview)));
    }
  }, { rootMargin: "300px" });
  const holders = document.querySelectorAll("#curves .plot");
  holders.forEach((holder) => seen.observe(holder));
  if (missing.length) document.getElementById("curves").append(el("p.note", {}, `${NONE} not measured: ${missing.join(", ")}.`));
}

function legendOf(overview) {
  const entries = overview.runs.map((run, number) => [`run ${number}`, run.name, colour(number)]);
  overview.groups.forEach((group, number) => entries.push([`group ${number}`, `mean of ${group.runs.length} (${group.label}), 95% interval`, colour(group.runs[0])]));
  return entries.map(([key, label, of]) => el("label", {}, el("input", {
    type: "checkbox", checked: !hiddenLines.has(key),
    onchange: (event) => { event.target.checked ? hiddenLines.delete(key) : hiddenLines.add(key); drawCurves(overview); },
  }), " ", swatch(of), label));
}

// Lines of a curve: {label, colour, x, y, dash?, faint?, low?, high?}.
function linesOf(curve, overview) {
  const lines = [], scored = curve.key === "accuracy" || curve.key === "good_steps", several = overview.runs.length > 1;
  overview.runs.forEach((run, number) => {
    if (hiddenLines.has(`run ${number}`)) return;
    const series = run.series[curve.key];
    if (scored && several) {
      const mean = run.mean_scores[curve.key];
      if (mean.x.length) lines.push({ ...mean, label: `${run.name}, mean of families`, colour: colour(number), points: true });
    } else if (scored) {
      series.forEach((line, place) => lines.push({
        ...line, label: `${line.task}${line.split === "test" ? "" : `, ${line.split}`}`,
        colour: colour(place), dash: line.split === "test" ? null : [5, 4], points: true,
      }));
    } else if (series.x.length) {
      lines.push(...rawAndSmoothed(series, several ? run.name : "", colour(number)));
    }
  });
  overview.groups.forEach((group, number) => {
    const series = group.series[curve.key];
    if (hiddenLines.has(`group ${number}`) || !series.x.length) return;
    const line = { x: series.x, colour: colour(group.runs[0]) };
    lines.push({ ...line, y: series.high, label: "to", edge: true },
      { ...line, y: series.low, label: "95% interval from", edge: true, under: true },
      { ...line, y: series.mean, label: `mean of ${group.runs.length}`, width: 2.5 });
  });
  return lines;
}

function rawAndSmoothed(series, name, of) {
  if (series.x.length < 3 * SMOOTHED_OVER) return [{ ...series, label: name || "value", colour: of }];
  const half = (SMOOTHED_OVER - 1) / 2;
  const smooth = series.y.map((_, i) => {
    const near = series.y.slice(Math.max(0, i - half), i + half + 1).filter((value) => value !== null);
    return near.length ? near.reduce((sum, value) => sum + value, 0) / near.length : null;
  });
  const mean = { x: series.x, y: smooth, label: `${name ? `${name}, ` : ""}mean of ${SMOOTHED_OVER}`, colour: of };
  return name ? [mean] : [{ ...series, label: "value", colour: of, faint: true }, mean];
}

function plot(holder, curve, lines) {
  const xs = [...new Set(lines.flatMap((line) => line.x))].sort((a, b) => a - b);
  const place = new Map(xs.map((x, i) => [x, i]));
  const columns = lines.map((line) => {
    const values = new Array(xs.length).fill(undefined); // no point at this update: the line goes on to its next
    line.x.forEach((x, i) => { values[place.get(x)] = line.y[i]; });
    return values;
  });
  const ink = resolved("--quiet"), grid = resolved("--line");
  const axis = { stroke: ink, grid: { stroke: grid, width: 1 }, ticks: { stroke: grid, width: 1 }, font: "11px system-ui", size: 34 };
  const bands = lines.flatMap((line, i) => (line.under ? [{ series: [i, i + 1], fill: line.colour + "33" }] : []));
  const options = {
    width: Math.max(200, holder.clientWidth), height: HEIGHT, bands,
    cursor: { sync: { key: "updates" }, focus: { prox: 24 } }, focus: { alpha: lines.length > 2 ? 0.35 : 1 },
    scales: { x: { time: false, range: (_, low, high) => (low === high ? [low - 1, high + 1] : [low, high]) }, y: { range: () => roomy(lines) } },
    axes: [{ ...axis, size: 28 }, { ...axis, size: 52, values: (_, ticks) => ticks.map((tick) => shown(tick)) }],
    series: [{ label: "update", value: (_, x) => (x === null || x === undefined ? NONE : String(x)) },
      ...lines.map((line) => ({
        label: line.label, stroke: line.faint || line.edge ? line.colour + "99" : line.colour, dash: line.dash || undefined,
        width: line.width ?? (line.faint || line.edge ? 1 : 2), spanGaps: false, points: { show: line.points || line.x.length < 8, size: 5 },
        value: (_, y) => (y === null || y === undefined ? NONE : shown(y)),
      }))],
  };
  holder.setAttribute("role", "img");
  holder.setAttribute("aria-label", summaryOf(curve, lines));
  return new uPlot(options, [xs, ...columns], holder);
}

// A canvas takes no light-dark(): the colour as it is computed now.
function resolved(name) {
  const probe = el("span");
  probe.style.color = `var(${name})`;
  document.body.append(probe);
  const made = getComputedStyle(probe).color;
  probe.remove();
  return made;
}

// All lines with some room about them; of an interval no more than lets the lines still be seen.
function roomy(lines) {
  const valuesOf = (some) => some.flatMap((line) => line.y).filter((value) => value !== null && value !== undefined);
  const values = valuesOf(lines.filter((line) => !line.edge)), edges = valuesOf(lines.filter((line) => line.edge));
  if (!values.length) return [0, 1];
  const low = Math.min(...values), high = Math.max(...values), span = high - low || Math.abs(high) || 1;
  return [Math.max(Math.min(low, ...edges), low - span) - 0.06 * span, Math.min(Math.max(high, ...edges), high + span) + 0.06 * span];
}

function summaryOf(curve, lines) {
  const told = lines.filter((line) => !line.faint && !line.edge).map((line) => {
    const values = line.y.filter((value) => value !== null && value !== undefined);
    return `${line.label}: ${shown(values[0])} at first, ${shown(values.at(-1))} at last`;
  });
  return `${curve.title}${curve.unit ? `, ${curve.unit}` : ""}. ${told.join("; ")}`;
}

function resizeCharts() {
  for (const chart of charts) {
    const width = chart.root.parentElement.clientWidth;
    if (width && width !== chart.width) chart.setSize({ width, height: HEIGHT });
  }
}
