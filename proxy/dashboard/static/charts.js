// Figures over time. Lines differ in dash as well as in colour; the legend is text and shows the value under the cursor.

/* global uPlot */
import { $, count, h, known, NONE, percent, seconds, text } from "./dom.js";

const RANGES = [
  ["5 min", 300],
  ["15 min", 900],
  ["1 h", 3600],
];
const GAP = 30; // seconds without a sample: the line is broken
const DASHES = [[], [6, 3], [2, 3], [8, 3, 2, 3], [1, 2], [4, 2]];
const lines = (...list) => list.map(([key, name], i) => ({ key, name, color: `c${i}`, dash: DASHES[i % DASHES.length] }));
const percentiles = (what) => lines([`${what}_p50`, "p50"], [`${what}_p95`, "p95"], [`${what}_p99`, "p99"]);
const perSecond = (value) => (known(value) ? `${count(value)}/s` : NONE);

const TIERS = { dram: "dram", disk: "disk", redis: "redis", s3: "s3", mooncake: "mooncake", fs: "fs" };

// `prefix` instead of `lines`: one line for every key that begins so, known only from the samples.
const CHARTS = [
  { id: "ttft", title: "Time to first token", lines: percentiles("ttft"), shown: seconds },
  { id: "itl", title: "Time between tokens", lines: percentiles("itl"), shown: seconds },
  {
    id: "paths",
    title: "Requests by path",
    prefix: "req_",
    shown: perSecond,
    top: 1,
    names: { pd: "PD", local: "local", cache: "cache hit", recovered: "recovered", passthrough: "passed on" },
  },
  { id: "hits", title: "Tokens loaded by tier", prefix: "hit_", names: TIERS, shown: perSecond, top: 1, empty: "No engine tells what it loaded." },
  {
    id: "saved",
    title: "Loading against computing saved",
    lines: lines(["load", "loading"], ["saved", "saved"]),
    shown: (value) => (known(value) ? `${seconds(value)}/s` : NONE),
    empty: "No engine tells what loading saved.",
  },
  { id: "occupancy", title: "Tiers: share of their cap in use", prefix: "full_", names: TIERS, shown: percent, top: 1, empty: "No cache daemon is known." },
  { id: "evictions", title: "Evictions by tier", prefix: "evict_", names: TIERS, shown: perSecond, top: 1, empty: "No cache daemon is known." },
  {
    id: "failures",
    title: "Failures",
    lines: lines(["fail_legs", "engine"], ["fail_transfer", "transfer"], ["fail_digest", "digest"]),
    shown: count,
    bars: true,
    top: 1,
    empty: "None.",
  },
  {
    id: "queue",
    title: "Queue",
    lines: lines(["waiting", "at the gate"], ["engine_waiting", "in engines"], ["running", "running"], ["limit", "limit"]),
    shown: count,
    top: 1,
  },
];

// CSS resolves the theme's colours; a canvas needs them resolved.
function color(name) {
  const probe = $("#color-probe") || document.body.appendChild(h("i", { id: "color-probe", hidden: true }));
  probe.style.color = `var(--${name})`;
  return getComputedStyle(probe).color;
}

class Chart {
  constructor(spec) {
    this.spec = spec;
    this.lines = spec.lines || [];
    this.legend = h("ul", { class: "legend" });
    this.plot = h("div", { class: "plot", "aria-hidden": "true" });
    this.note = h("p", { class: "empty", hidden: true }, spec.empty || "Nothing yet.");
    this.box = h("figure", { class: "card chart", id: `chart-${spec.id}` }, h("figcaption", {}, spec.title), this.legend, this.plot, this.note);
  }

  findLines(samples) {
    if (!this.spec.prefix) return false;
    const keys = new Set();
    for (const sample of samples) for (const key in sample) if (key.startsWith(this.spec.prefix)) keys.add(key);
    const short = (key) => key.slice(this.spec.prefix.length);
    // What has a name keeps its place, and with it its colour, whatever comes after it.
    const places = Object.keys(this.spec.names);
    const place = (key) => (places.includes(short(key)) ? places.indexOf(short(key)) : places.length);
    const found = [...keys].sort((a, b) => place(a) - place(b) || a.localeCompare(b)).slice(0, 8);
    if (found.join() === this.lines.map((line) => line.key).join()) return false;
    this.lines = found.map((key) => ({
      key,
      name: this.spec.names[short(key)] || short(key),
      color: `c${Math.min(5, place(key))}`,
      dash: DASHES[place(key) % DASHES.length],
    }));
    return true;
  }

  build() {
    this.uplot?.destroy();
    const { shown, bars, top } = this.spec;
    const axis = { stroke: color("muted"), grid: { stroke: color("line"), width: 1 }, ticks: { show: false }, font: "11px system-ui" };
    const series = this.lines.map((line) => ({
      label: line.name,
      stroke: color(line.color),
      width: 1.5,
      dash: bars ? [] : line.dash,
      points: { show: false },
      spanGaps: false,
      ...(bars ? { fill: color(line.color), paths: uPlot.paths.bars({ size: [0.8, 6] }) } : {}),
    }));
    const options = {
      width: Math.max(200, this.plot.clientWidth),
      height: 132,
      padding: [6, 14, 0, 0],
      legend: { show: false },
      cursor: { sync: { key: "time" }, drag: { x: false, y: false }, points: { size: 6 } },
      scales: {
        x: { time: true },
        y: { range: (u, min, max) => [0, Math.max(top || 0, (max || 0) * 1.1, 1e-6)] },
      },
      axes: [
        { ...axis, size: 24, space: 70, values: (u, at) => at.map((t) => clockTick(t, u.scales.x)) },
        { ...axis, size: 62, space: 32, values: (u, at) => at.map((value) => (value === 0 ? "0" : shown(value))) },
      ],
      series: [{}, ...series],
      hooks: { setCursor: [(u) => this.values(u.cursor.idx)] },
    };
    this.uplot = new uPlot(options, this.data, this.plot);
    this.items = this.lines.map((line) => {
      const value = h("b", {});
      const swatch = h("svg", { viewBox: "0 0 18 4", "aria-hidden": "true" });
      const attributes = { d: "M0 2H18", class: line.color };
      if (!bars) attributes["stroke-dasharray"] = line.dash.join(" ") || null;
      swatch.append(h("path", attributes));
      return { value, item: h("li", {}, swatch, line.name, " ", value) };
    });
    this.legend.replaceChildren(...this.items.map(({ item }) => item));
  }

  values(index) {
    const last = this.data[0].length - 1;
    const at = known(index) ? index : last;
    this.items?.forEach(({ value }, i) => text(value, at >= 0 ? this.spec.shown(this.data[i + 1]?.[at] ?? (this.spec.bars ? 0 : null)) : NONE));
  }

  show(samples, from, to) {
    const changed = this.findLines(samples);
    const drawn = this.drawn(samples);
    this.data = [drawn.map((s) => s.t), ...this.lines.map((line) => drawn.map((s) => this.value(s[line.key])))];
    const nothing = !this.lines.length || !this.data.slice(1).some((values) => values.some(known));
    this.note.hidden = !nothing;
    this.box.classList.toggle("nothing", nothing);
    if (!this.uplot || changed) this.build();
    this.uplot.batch(() => {
      this.uplot.setData(this.data, true); // both axes anew
      this.uplot.setScale("x", { min: from, max: to });
    });
    this.values(this.uplot.cursor.idx);
  }

  // What did not happen has no bar.
  value(number) {
    return known(number) && !(this.spec.bars && number === 0) ? number : null;
  }

  // A time without samples breaks the lines: an empty sample stands there.
  drawn(samples) {
    const out = [];
    samples.forEach((sample, i) => {
      if (i && sample.t - samples[i - 1].t > GAP) out.push({ t: samples[i - 1].t + 1 });
      out.push(sample);
    });
    return out;
  }

  fit() {
    this.uplot?.setSize({ width: Math.max(200, this.plot.clientWidth), height: 132 });
  }
}

// At the right edge a label would be cut.
function clockTick(unix, { min, max }) {
  const span = max - min;
  if (unix > max - span / 14) return "";
  const parts = { hour: "2-digit", minute: "2-digit", hour12: false };
  if (span <= 300) parts.second = "2-digit";
  return new Date(unix * 1000).toLocaleTimeString([], parts);
}

export class Charts {
  constructor() {
    this.range = 300;
    this.samples = [];
    this.charts = CHARTS.map((spec) => new Chart(spec));
    $("#charts").append(...this.charts.map((chart) => chart.box));
    $("#ranges").append(
      ...RANGES.map(([name, span]) =>
        h("button", { type: "button", "aria-pressed": span === this.range, onclick: (event) => this.choose(event.target, span) }, name),
      ),
    );
    new ResizeObserver(() => this.charts.forEach((chart) => chart.fit())).observe($("#charts"));
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => this.recolor());
  }

  choose(button, span) {
    this.range = span;
    for (const other of button.parentElement.children) other.setAttribute("aria-pressed", other === button);
    this.show();
  }

  recolor() {
    for (const chart of this.charts) if (chart.uplot) chart.build();
    this.show();
  }

  set(samples) {
    this.samples = samples.map(withShares);
  }

  add(sample) {
    const last = this.samples.at(-1);
    if (last && sample.t <= last.t) return;
    this.samples.push(withShares(sample));
    if (this.samples.length > 2000) this.samples.splice(0, this.samples.length - 1800);
  }

  show(now = this.now) {
    this.now = now;
    if (!now) return;
    // What is not there yet takes no room: the axis begins with the first sample, but spans a minute at least.
    const from = Math.max(now - this.range, Math.min(this.samples[0]?.t ?? now, now - 60));
    const first = this.samples.findIndex((sample) => sample.t >= from - 15);
    const part = first < 0 ? [] : this.samples.slice(first);
    for (const chart of this.charts) chart.show(part, from, now);
  }
}

function withShares(sample) {
  for (const key of Object.keys(sample)) {
    if (key.startsWith("used_") && sample[`cap_${key.slice(5)}`] > 0) sample[`full_${key.slice(5)}`] = sample[key] / sample[`cap_${key.slice(5)}`];
  }
  return sample;
}
