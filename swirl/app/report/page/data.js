// Where the page's data comes from: parts that lie in it, compressed, or a server on loopback that shows a run live.

const LIVE = document.documentElement.dataset.live === "yes";
const loading = new Map();

async function unpacked(base64) {
  const text = atob(base64);
  const bytes = Uint8Array.from(text, (character) => character.charCodeAt(0));
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
  return new Response(stream).json();
}

async function fetched(name) {
  const response = await fetch(`data/${name}`, { cache: "no-store" });
  if (!response.ok) throw new Error(await response.text());
  return response.json();
}

// The part of that name as JSON, read once and kept, until `forget`.
function part(name) {
  if (!loading.has(name)) {
    loading.set(name, LIVE ? fetched(name) : unpacked(document.getElementById(`part-${name}`).textContent));
  }
  return loading.get(name);
}

function forget(isGone) {
  for (const name of [...loading.keys()]) if (isGone(name)) loading.delete(name);
}

// An element with attributes and children. Text is always text: nothing here is ever read as markup.
function el(tag, attributes = {}, ...children) {
  const [name, ...classes] = tag.split(".");
  const made = document.createElement(name);
  if (classes.length) made.className = classes.join(" ");
  for (const [key, value] of Object.entries(attributes)) {
    if (value === null || value === undefined || value === false) continue;
    if (key.startsWith("on")) made.addEventListener(key.slice(2), value);
    else made.setAttribute(key, value === true ? "" : value);
  }
  made.append(...children.flat().filter((child) => child !== null && child !== undefined && child !== false));
  return made;
}

const NONE = "–"; // what was not measured

function shown(value, digits = 3) {
  if (value === null || value === undefined || Number.isNaN(value)) return NONE;
  const size = Math.abs(value);
  if (value === 0) return "0";
  if (size >= 100) return Number(value.toFixed(size >= 1e4 ? 0 : 1)).toLocaleString("en").replace("-", "−");
  return (size < 1e-3 ? value.toExponential(1) : String(Number(value.toPrecision(digits)))).replace(/^-/, "−");
}

const percent = (share) => (share === null || share === undefined ? NONE : `${(100 * share).toFixed(1)}%`);
const fixed = (value, digits = 2) => value.toFixed(digits).replace(/^-(0\.?0*)$/, "$1").replace("-", "−");
const signed = (value, digits = 1) => `${value > 0 ? "+" : ""}${fixed(value, digits)}`;
// Told apart without red against green; lighter on a dark ground.
const COLOURS = {
  light: ["#0067b8", "#c85200", "#00805c", "#b5468f", "#9a7000", "#2a8fc4", "#5f4bc4", "#5b6570"],
  dark: ["#4ea8ff", "#ff9d4d", "#3fd1a0", "#f29ccf", "#f2c94c", "#8ad4ff", "#b6a2ff", "#b8c2cc"],
};
const systemTheme = matchMedia("(prefers-color-scheme: dark)");
const theme = () => document.documentElement.dataset.theme ?? (systemTheme.matches ? "dark" : "light");
const colour = (number) => COLOURS[theme()][number % COLOURS.light.length];
