// The live picture: producers -> cache tiers -> consumers. Cards are elements, so that they wrap, are read aloud and can
// be searched; the links between them are drawn in an SVG behind them, anew when something moves.

import { $, bytes, count, duration, exact, h, known, meter, percent, rate, state } from "./dom.js";

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

function engineCard(engine, now) {
  const [kind, word, trouble] = engineState(engine);
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
      producers.length ? column("Producers", "producers", producers.map((engine) => engineCard(engine, picture.at))) : null,
      column(caches.length > 1 ? "Caches" : "Cache", "caches", caches),
      column(title, "consumers", consumers.map((engine) => engineCard(engine, picture.at))),
    ].filter(Boolean);
    this.columns.replaceChildren(...shown);
    this.columns.dataset.columns = shown.length;
    this.draw();
  }

  flow(what) {
    const values = this.picture.caches.map((cache) => cache[what]).filter(known);
    return values.length ? values.reduce((all, value) => all + value, 0) : null;
  }

  draw() {
    if (!this.picture || !this.root.offsetWidth) return;
    const base = this.root.getBoundingClientRect();
    const box = (element) => {
      const at = element.getBoundingClientRect();
      return { left: at.left - base.left, right: at.right - base.left, top: at.top - base.top, bottom: at.bottom - base.top, mid: (at.top + at.bottom) / 2 - base.top };
    };
    this.links.setAttribute("viewBox", `0 0 ${base.width} ${base.height}`);
    const boxes = (selector) => [...this.columns.querySelectorAll(selector)].map((element) => ({ ...box(element), down: element.classList.contains("is-down") }));
    const caches = boxes(".caches .node");
    const parts = [];
    const stored = this.flow("stored_s");
    const loaded = this.flow("loaded_s");
    parts.push(...this.bundle(boxes(".producers .node"), caches, stored, "stored"));
    parts.push(...this.bundle(caches, boxes(".consumers .node"), loaded, "loaded"));
    this.links.replaceChildren(...parts);
    this.flows.textContent = `Stored ${rate(stored)}, loaded ${rate(loaded)}.`;
  }

  // Every card on one side with every card on the other; one label for all of them, since daemons count together.
  bundle(from, to, flow, word) {
    if (!from.length || !to.length) return [];
    const width = known(flow) && flow > 0 ? Math.min(6, 1.5 + Math.log10(1 + flow / 1e5)) : 1.25;
    const stacked = to[0].top >= from.at(-1).bottom - 1;
    const paths = [];
    if (stacked) {
      const x = (from[0].left + from[0].right) / 2;
      paths.push(link(`M${x} ${from.at(-1).bottom + 4}V${to[0].top - 34}`, flow, width, false));
      paths.push(...label(x + 12, (from.at(-1).bottom + to[0].top - 26) / 2 + 4, flow, word, "start"));
      return paths;
    }
    for (const a of from) {
      for (const b of to) {
        const middle = (a.right + b.left) / 2;
        paths.push(link(`M${a.right + 3} ${a.mid}C${middle} ${a.mid} ${middle} ${b.mid} ${b.left - 7} ${b.mid}`, a.down || b.down ? null : flow, width, a.down || b.down));
      }
    }
    const mids = [...from, ...to].map((one) => one.mid);
    const y = mids.reduce((all, mid) => all + mid, 0) / mids.length;
    return [...paths, ...label((from[0].right + to[0].left) / 2, y, flow, word, "middle")];
  }
}

function link(d, flow, width, broken) {
  const kind = broken ? "broken" : known(flow) && flow > 0 ? "flowing" : "idle";
  const path = h("path", { d, class: `link ${kind}` });
  path.style.setProperty("stroke-width", `${broken ? 1.25 : width}px`);
  const [x, y, turn] = d.includes("C") ? [...d.match(/([\d.-]+) ([\d.-]+)$/).slice(1).map(Number), 0] : [Number(d.match(/^M([\d.-]+)/)[1]), Number(d.match(/V([\d.-]+)/)[1]), 90];
  const head = h("path", { d: "M-6-4 1 0-6 4Z", class: `arrow ${kind}`, transform: `translate(${x + (turn ? 0 : 4)} ${y}) rotate(${turn})` });
  return h("g", {}, path, head);
}

function label(x, y, flow, word, anchor) {
  const said = known(flow) ? rate(flow) : "–";
  const width = Math.max(said.length, word.length) * 6.6 + 14;
  const left = anchor === "middle" ? x - width / 2 : x - 4;
  const center = left + width / 2;
  return [
    h("rect", { x: left, y: y - 18, width, height: 36, rx: 6, class: "label-box" }),
    h("text", { x: center, y: y - 3, "text-anchor": "middle", class: "label-figure" }, said),
    h("text", { x: center, y: y + 11, "text-anchor": "middle", class: "label-word" }, word),
  ];
}
