// The live picture: producers -> cache tiers -> consumers. Cards are elements, so that they wrap, are read aloud and can
// be searched; the links between them are drawn in an SVG behind them, anew when something moves.

import { $, NONE, bytes, count, duration, exact, h, known, meter, percent, rate, state } from "./dom.js";

const STATES = { up: ["good", "up"], trial: ["busy", "on trial"], draining: ["busy", "draining"], down: ["bad", "down"] };
// What the launcher knows better than a probe: why something is not there.
const PROCESS = { waiting: "waiting", starting: "starting", restarting: "restarting", failed: "failed", stopping: "stopping", stopped: "stopped" };

function engineState(engine) {
  const [kind, word] = STATES[engine.state] || ["off", engine.state];
  const told = engine.state === "down" && engine.process && PROCESS[engine.process.state];
  return told ? [engine.process.state === "failed" ? "bad" : "warn", `down, ${told}`, kind] : [kind, word, kind];
}

function fact(name, value, title) {
  return h("div", { class: "fact", title }, h("dt", {}, name), h("dd", {}, value));
}

// What goes between an engine and the caches, all of them together; null where no daemon counts it.
function linkOf(engine, caches) {
  const told = caches.map((cache) => cache.engines?.[engine.name]).filter(Boolean);
  if (!told.length) return null;
  const sum = (of) => (told.some((one) => known(of(one))) ? told.reduce((all, one) => all + (of(one) || 0), 0) : null);
  const tiers = [...new Set(told.flatMap((one) => Object.keys(one.by_tier)))].sort();
  return { stored: sum((one) => one.stored_s), loaded: sum((one) => one.loaded_s), tiers: tiers.map((tier) => [tier, sum((one) => one.by_tier[tier])]) };
}

// In words and by tier, for those who cannot see the lines.
function linkWords(link) {
  if (!link || !known(link.stored)) return null;
  const tiers = link.tiers.filter(([, bytes]) => bytes > 0).map(([tier, bytes]) => `${tier} ${rate(bytes)}`);
  const from = link.loaded > 0 ? `, loaded ${rate(link.loaded)}${tiers.length > 1 ? ` (${tiers.join(", ")})` : tiers.length ? ` from ${link.tiers.find(([, bytes]) => bytes > 0)[0]}` : ""}` : ", loaded nothing";
  return `stored ${link.stored > 0 ? rate(link.stored) : "nothing"}${from}`;
}

function engineCard(engine, now, link) {
  const [kind, word, trouble] = engineState(engine);
  const words = linkWords(link);
  const up = engine.state !== "down";
  const restarts = engine.restarts_by === "launcher" ? "restarts" : "restarts seen";
  return h(
    "article",
    { class: `node ${trouble === "bad" ? "is-down" : ""}`, "data-engine": engine.name, "data-state": engine.state, "aria-label": `${engine.role} ${engine.name}: ${word}` },
    h("header", {}, h("h4", { title: engine.url }, engine.name), state(trouble === "bad" ? "bad" : kind, word)),
    h(
      "dl",
      { class: "facts" },
      fact("running", up ? exact(engine.running ?? engine.in_flight) : "–"),
      fact("waiting", up ? exact(engine.waiting) : "–"),
      fact(engine.role === "prefill" ? "tokens in" : "tokens out", up ? perSecond(engine.role === "prefill" ? engine.prompt_s : engine.output_s) : "–"),
      engine.role === "prefill" ? null : fact("loaded", up ? perSecond(engine.loaded_s) : "–", "tokens loaded from the cache instead of computed"),
    ),
    words && up ? h("p", { class: "tier-facts", "data-link": engine.name, title: "between this engine and the cache, a second" }, words) : null,
    h("div", { class: "gauge" }, h("span", {}, "KV in use"), meter(engine.kv_used, `KV cache of ${engine.name} in use`), h("b", {}, percent(engine.kv_used))),
    h(
      "footer",
      {},
      h("span", {}, engine.version ? `v${engine.version.replace(/^v/, "")}` : "version unknown"),
      h("span", {}, `${exact(engine.restarts)} ${restarts}`),
      h("span", { title: "since it came into this state" }, `for ${duration(now - engine.since)}`),
    ),
    engine.state === "down" && engine.process?.detail ? h("p", { class: "detail" }, engine.process.detail) : null,
  );
}

const perSecond = (value) => (known(value) ? `${count(value)}/s` : "–");

function tierRow(tier) {
  const well = tier.state === "ok";
  const share = tier.capacity ? tier.used / tier.capacity : null;
  const open = tier.circuit && tier.circuit !== "closed";
  return h(
    "li",
    { class: "tier", "data-tier": tier.name },
    h("div", { class: "tier-head" }, h("b", {}, tier.name), state(well ? "good" : open ? "warn" : "bad", well ? "ok" : open ? `cut off (${tier.circuit})` : "not well")),
    tier.capacity
      ? h("div", { class: "gauge" }, meter(share, `${tier.name} in use`), h("b", {}, `${bytes(tier.used)} of ${bytes(tier.capacity)}`))
      : h("p", { class: "muted" }, "size not known: shared with others"),
    h(
      "p",
      { class: "tier-facts" },
      [
        tier.capacity ? `${exact(tier.chunks)} chunks` : null,
        `${exact(tier.evictions)} evicted`,
        known(tier.up_s) ? `↑ ${rate(tier.up_s)}` : null,
        known(tier.down_s) ? `↓ ${rate(tier.down_s)}` : null,
        known(tier.loaded_s) ? `→ engines ${rate(tier.loaded_s)}` : null,
        tier.queue ? `${exact(tier.queue)} queued` : null,
      ]
        .filter(Boolean)
        .join(" · "),
    ),
    well ? null : h("p", { class: "detail" }, tier.state),
  );
}

function peerRow(peer) {
  const facts = [known(peer.in_s) ? `from it ${rate(peer.in_s)}` : null, known(peer.out_s) ? `to it ${rate(peer.out_s)}` : null, `${exact(peer.chunks)} chunks there`];
  return h(
    "li",
    { class: "tier", "data-peer": peer.name },
    h("div", { class: "tier-head" }, h("b", {}, `peer ${peer.name}`), state(peer.state === "up" ? "good" : peer.state === "down" ? "bad" : "busy", peer.state)),
    h("p", { class: "tier-facts" }, facts.filter(Boolean).join(" · ")),
    peer.problem ? h("p", { class: "detail" }, peer.problem) : null,
  );
}

function cacheCard(cache) {
  const up = cache.state === "up";
  const asked = cache.hits + cache.misses;
  return h(
    "article",
    { class: `node cache ${up ? "" : "is-down"}`, "data-cache": cache.name, "data-state": cache.state, "aria-label": `cache ${cache.name}: ${cache.state}` },
    h("header", {}, h("h4", { title: cache.url }, cache.name), state(up ? "good" : "bad", up ? "up" : "no answer")),
    up ? null : h("p", { class: "detail" }, `${cache.problem}${known(cache.age_s) ? `; what follows is ${duration(cache.age_s)} old` : ""}`),
    cache.tiers.length ? h("ul", { class: "tiers" }, ...cache.tiers.map(tierRow)) : null,
    cache.peers.length ? h("ul", { class: "tiers" }, ...cache.peers.map(peerRow)) : null,
    cache.tiers.length
      ? h(
          "footer",
          {},
          h("span", {}, asked ? `${percent(cache.hits / asked)} of chunks hit` : "nothing asked yet"),
          h("span", {}, `${exact(cache.clients.length)} connections`),
          h("span", {}, `up ${duration(cache.uptime_s)}`),
        )
      : null,
  );
}

function noCache() {
  return h("article", { class: "node cache none" }, h("header", {}, h("h4", {}, "No cache daemon known")), h("p", { class: "muted" }, "Start the proxy with --cache URL to see its tiers here."));
}

export class Topology {
  constructor() {
    this.root = $("#topology");
    this.links = h("svg", { class: "links", "aria-hidden": "true" });
    this.columns = h("div", { class: "columns" });
    this.flows = h("p", { class: "hidden", id: "flows" });
    this.root.append(this.links, this.columns, this.flows);
    this.shape = "";
    new ResizeObserver(() => this.draw()).observe(this.root);
  }

  show(picture) {
    this.picture = picture;
    const of = (...roles) => picture.engines.filter((engine) => roles.includes(engine.role));
    const column = (name, key, cards) => h("section", { class: `column ${key}`, "aria-label": name }, h("h3", {}, name), ...cards);
    const producers = of("prefill");
    const consumers = of("decode", "both");
    const title = of("decode").length ? (of("both").length ? "Consumers and both" : "Consumers") : "Engines, prefill and decode";
    const caches = picture.caches.length ? picture.caches.map(cacheCard) : [noCache()];
    const shown = [
      producers.length ? column("Producers", "producers", producers.map((engine) => engineCard(engine, picture.at, linkOf(engine, picture.caches)))) : null,
      column(caches.length > 1 ? "Caches" : "Cache", "caches", caches),
      column(title, "consumers", consumers.map((engine) => engineCard(engine, picture.at, linkOf(engine, picture.caches)))),
    ].filter(Boolean);
    this.columns.replaceChildren(...shown);
    this.columns.dataset.columns = shown.length;
    this.draw();
  }

  draw() {
    if (!this.picture || !this.root.offsetWidth) return;
    const base = this.root.getBoundingClientRect();
    const box = (element) => {
      const at = element.getBoundingClientRect();
      return { left: at.left - base.left, right: at.right - base.left, top: at.top - base.top, bottom: at.bottom - base.top, mid: (at.top + at.bottom) / 2 - base.top };
    };
    this.links.setAttribute("viewBox", `0 0 ${base.width} ${base.height}`);
    const boxes = (selector) => [...this.columns.querySelectorAll(selector)].map((element) => ({ ...box(element), name: element.dataset.engine || element.dataset.cache, down: element.classList.contains("is-down") }));
    const caches = boxes(".caches .node");
    const sides = [boxes(".producers .node"), boxes(".consumers .node")];
    this.links.replaceChildren(...sides.flatMap((engines, side) => this.bundle(engines, caches, side === 0)));
    const words = this.picture.engines.map((engine) => [engine.name, linkWords(linkOf(engine, this.picture.caches))]).filter(([, said]) => said);
    this.flows.textContent = words.map(([name, said]) => `${name}: ${said}.`).join(" ");
  }

  // One line for each engine and each cache that it is connected to, with what goes over it; where the columns lie below
  // each other, one for all of them.
  bundle(engines, caches, before) {
    if (!engines.length || !caches.length) return [];
    const [from, to] = before ? [engines, caches] : [caches, engines];
    if (to[0].top >= from.at(-1).bottom - 1) return this.stacked(engines, from, to);
    const lines = [];
    const labels = [];
    for (const engine of engines) {
      const shown = this.picture.caches.filter((cache) => cache.engines?.[engine.name]).map((cache) => cache.name);
      for (const cache of caches.filter((one) => !shown.length || shown.includes(one.name))) {
        const [a, b] = before ? [engine, cache] : [cache, engine];
        const middle = (a.right + b.left) / 2;
        const told = this.picture.caches.find((one) => one.name === cache.name)?.engines?.[engine.name];
        const flow = told && (told.stored_s || 0) + (told.loaded_s || 0);
        const broken = a.down || b.down;
        lines.push(line(`M${a.right + 3} ${a.mid}C${middle} ${a.mid} ${middle} ${b.mid} ${b.left - 7} ${b.mid}`, broken ? null : flow, broken));
      }
      const all = linkOf({ name: engine.name }, this.picture.caches);
      const center = before ? (engine.right + caches[0].left) / 2 : (caches[0].right + engine.left) / 2;
      if (all && known(all.stored) && !engine.down) labels.push(...label(center, engine.mid, all, "middle"));
    }
    return [...lines, ...labels];
  }

  stacked(engines, from, to) {
    const links = engines.filter((engine) => !engine.down).map((engine) => linkOf(engine, this.picture.caches)).filter(Boolean);
    const sum = (what) => (links.some((one) => known(one[what])) ? links.reduce((all, one) => all + (one[what] || 0), 0) : null);
    const all = { stored: sum("stored"), loaded: sum("loaded") };
    const x = (from[0].left + from[0].right) / 2;
    return [line(`M${x} ${from.at(-1).bottom + 4}V${to[0].top - 34}`, (all.stored || 0) + (all.loaded || 0), false), ...label(x + 12, (from.at(-1).bottom + to[0].top - 26) / 2 + 4, all, "start")];
  }
}

const thickness = (flow) => (known(flow) && flow > 0 ? Math.min(6, 1.5 + Math.log10(1 + flow / 1e5)) : 1.25);

function line(d, flow, broken) {
  const kind = broken ? "broken" : known(flow) && flow > 0 ? "flowing" : "idle";
  const path = h("path", { d, class: `link ${kind}` });
  path.style.setProperty("stroke-width", `${broken ? 1.25 : thickness(flow)}px`);
  const [x, y, turn] = d.includes("C") ? [...d.match(/([\d.-]+) ([\d.-]+)$/).slice(1).map(Number), 0] : [Number(d.match(/^M([\d.-]+)/)[1]), Number(d.match(/V([\d.-]+)/)[1]), 90];
  const head = h("path", { d: "M-6-4 1 0-6 4Z", class: `arrow ${kind}`, transform: `translate(${x + (turn ? 0 : 4)} ${y}) rotate(${turn})` });
  return h("g", {}, path, head);
}

// Up to two figures on a link: what is stored and what is loaded. One that is nothing is left out if the other is something.
function label(x, y, flow, anchor) {
  const some = ["stored", "loaded"].filter((what) => flow[what] > 0);
  const said = (some.length ? some : [known(flow.stored) ? "idle" : "not told"]).map((what) => (flow[what] > 0 ? [rate(flow[what]), what] : [NONE, what]));
  const beside = anchor === "start"; // there is room to the right of a line that goes down, and none above and below
  const each = Math.max(...said.flat().map((words) => words.length)) * 6.6 + 14;
  const [width, height] = beside ? [each * said.length, 36] : [each, said.length * 28 + 8];
  const [left, top] = [beside ? x - 4 : x - width / 2, y - height / 2];
  const at = (n) => (beside ? [left + each * (n + 0.5), top] : [left + each / 2, top + n * 28]);
  return [
    h("rect", { x: left, y: top, width, height, rx: 6, class: "label-box" }),
    ...said.flatMap(([figure, word], n) => [
      h("text", { x: at(n)[0], y: at(n)[1] + 15, "text-anchor": "middle", class: "label-figure" }, figure),
      h("text", { x: at(n)[0], y: at(n)[1] + 28, "text-anchor": "middle", class: "label-word" }, word),
    ]),
  ];
}
