// Elements and numbers. Text goes in as text, never as markup: ids and models come from clients.

export const $ = (selector, root = document) => root.querySelector(selector);

const SVG = new Set(["svg", "path", "text", "g", "rect", "marker", "title"]);

// h("td", {class: "number"}, "12"): an element with attributes and children; null children are left out.
export function h(tag, attributes = {}, ...children) {
  const made = SVG.has(tag) ? document.createElementNS("http://www.w3.org/2000/svg", tag) : document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name === "style") Object.entries(value).forEach(([key, text]) => made.style.setProperty(key, text));
    else if (name.startsWith("on")) made.addEventListener(name.slice(2), value);
    else if (value === true && !name.startsWith("aria-")) made.setAttribute(name, "");
    else if ((value !== false || name.startsWith("aria-")) && value != null) made.setAttribute(name, String(value));
  }
  made.append(...children.flat().filter((child) => child != null && child !== false));
  return made;
}

// Changes the text only if it differs, so that selections and screen readers are left in peace.
export function text(element, value) {
  if (element.textContent !== value) element.textContent = value;
}

export const known = (value) => value !== null && value !== undefined && Number.isFinite(value);
export const NONE = "–";

function scaled(value, steps, base) {
  let step = 0;
  while (Math.abs(value) >= base && step < steps.length - 1) {
    value /= base;
    step += 1;
  }
  const digits = step === 0 && Number.isInteger(value) ? 0 : Math.abs(value) < 10 ? 1 : 0;
  return `${value.toFixed(digits)}${steps[step]}`;
}

export const count = (value) => (known(value) ? scaled(value, ["", "k", "M", "G"], 1000) : NONE);
export const exact = (value) => (known(value) ? Math.round(value).toLocaleString("en-US").replaceAll(",", " ") : NONE);
export const bytes = (value) => (known(value) ? scaled(value, [" B", " KiB", " MiB", " GiB", " TiB"], 1024) : NONE);
export const rate = (value) => (known(value) ? `${scaled(value, [" B", " kB", " MB", " GB"], 1000)}/s` : NONE);
export const percent = (value) => (known(value) ? `${(100 * value).toFixed(value > 0 && value < 0.0995 ? 1 : 0)} %` : NONE);

export function seconds(value) {
  if (!known(value)) return NONE;
  if (value === 0) return "0 s";
  if (value < 0.001) return `${(value * 1e6).toFixed(0)} µs`;
  if (value < 0.01) return `${(value * 1000).toFixed(1)} ms`;
  if (value < 1) return `${(value * 1000).toFixed(0)} ms`;
  if (value < 10) return `${value.toFixed(2)} s`;
  if (value < 100) return `${value.toFixed(1)} s`;
  return duration(value);
}

export function duration(value) {
  if (!known(value)) return NONE;
  const whole = Math.max(0, Math.round(value));
  if (whole < 60) return `${whole} s`;
  if (whole < 3600) return `${Math.floor(whole / 60)} min`;
  if (whole < 86400) return `${Math.floor(whole / 3600)} h ${Math.floor((whole % 3600) / 60)} min`;
  return `${Math.floor(whole / 86400)} d ${Math.floor((whole % 86400) / 3600)} h`;
}

export const clock = (unix) =>
  new Date(unix * 1000).toLocaleTimeString([], { hour: "2-digit", minute: "2-digit", second: "2-digit", hour12: false });

// A state is a mark, a word and a colour: the colour alone says nothing.
const MARKS = { good: "●", busy: "◐", warn: "▲", bad: "✕", off: "○" };
export function state(kind, word) {
  return h("span", { class: `state ${kind}` }, h("span", { class: "mark", "aria-hidden": "true" }, MARKS[kind]), word);
}

export function meter(share, label) {
  const width = `${Math.max(0, Math.min(1, share || 0)) * 100}%`;
  const attributes = { class: "meter", role: "meter", "aria-label": label, "aria-valuemin": 0, "aria-valuemax": 100 };
  attributes["aria-valuenow"] = Math.round((share || 0) * 100);
  return h("span", attributes, h("span", { style: { width } }));
}
