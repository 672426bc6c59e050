// The row of figures at the top.

import { $, count, exact, h, known, NONE, percent, seconds, text } from "./dom.js";

const sum = (values) => Object.values(values || {}).reduce((all, value) => all + value, 0);

// Each: a name, the figure, and a line beneath it. `data-raw` carries the unrounded figure.
const TILES = [
  {
    id: "requests",
    name: "Requests",
    figure: (p) => sum(p.totals.requests),
    shown: exact,
    under: (p, s) => `${rps(s)} a second · ${exact(failed(p))} failed`,
  },
  {
    id: "running",
    name: "Running",
    figure: (p) => p.totals.running,
    shown: exact,
    under: (p, s) => `${exact(s.engine_waiting)} wait in engines`,
  },
  {
    id: "ttft",
    name: "First token p50",
    figure: (p, s) => s.ttft_p50,
    shown: seconds,
    under: (p, s) => `p95 ${seconds(s.ttft_p95)} · p99 ${seconds(s.ttft_p99)}`,
  },
  {
    id: "itl",
    name: "Token gap p50",
    figure: (p, s) => s.itl_p50,
    shown: seconds,
    under: (p, s) => `p95 ${seconds(s.itl_p95)} · p99 ${seconds(s.itl_p99)}`,
  },
  {
    id: "hits",
    name: "Tokens from cache",
    figure: (p) => sum(p.totals.loaded_tokens),
    shown: count,
    under: (p) => byTier(p.totals.loaded_tokens),
  },
  {
    id: "saved",
    name: "Computing saved",
    figure: (p) => p.totals.saved_s,
    shown: seconds,
    under: (p) => (known(p.totals.load_s) ? `for ${seconds(p.totals.load_s)} of loading` : "no engine tells"),
  },
  {
    id: "failures",
    name: "Failures",
    figure: (p) => p.totals.digest_failures + p.totals.transfer_failures + sum(p.totals.leg_failures),
    shown: exact,
    bad: (p) => p.totals.digest_failures > 0,
    under: (p) =>
      `${exact(p.totals.digest_failures)} digest · ${exact(p.totals.transfer_failures)} transfer · ` +
      `${exact(sum(p.totals.leg_failures))} engine`,
  },
  {
    id: "slo",
    name: "First-token target",
    figure: (p) => p.slo_ttft,
    shown: (value) => (known(value) ? seconds(value) : "none set"),
    under: (p) =>
      p.slo_ttft
        ? `${met(p.totals.slo)} met · ${exact(p.totals.waiting)} wait · ${exact(sum(p.totals.refused))} refused`
        : `${exact(sum(p.totals.refused))} refused`,
  },
];

// Lines break between phrases, not within them.
const unbroken = (line) => (line.includes(" · ") ? line.split(" · ").map((part) => part.replaceAll(" ", "\u00a0")).join(" · ") : line);
const rps = (s) => {
  const rates = Object.entries(s).filter(([name, value]) => name.startsWith("req_") && name !== "req_recovered" && known(value));
  return rates.length ? count(rates.reduce((all, [, value]) => all + value, 0)) : NONE;
};
const met = (slo) => (slo?.met || slo?.missed ? percent((slo.met || 0) / ((slo.met || 0) + (slo.missed || 0))) : NONE);
const failed = (p) =>
  Object.entries(p.totals.statuses).reduce((all, [status, n]) => all + (Number(status) >= 400 && status !== "499" ? n : 0), 0);
const byTier = (tiers) =>
  Object.entries(tiers)
    .map(([tier, tokens]) => `${tier} ${count(tokens)}`)
    .join(" · ") || "nothing was loaded yet";

export class Tiles {
  constructor() {
    this.made = TILES.map((tile) => {
      const figure = h("dd", { class: "figure", id: `tile-${tile.id}` });
      const under = h("dd", { class: "under" });
      $("#tiles").append(h("div", { class: "tile card" }, h("dt", {}, tile.name), figure, under));
      return { tile, figure, under };
    });
  }

  show(picture, sample) {
    for (const { tile, figure, under } of this.made) {
      const value = tile.figure(picture, sample);
      text(figure, tile.shown(value));
      figure.dataset.raw = known(value) ? value : "";
      figure.classList.toggle("bad-text", Boolean(tile.bad?.(picture)));
      text(under, unbroken(tile.under(picture, sample)));
    }
  }
}
