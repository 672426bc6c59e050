// The table of recent requests. Rows are kept and changed in place, so that focus and selection stay where they are.

import { $, clock, count, exact, h, known, seconds, state, text } from "./dom.js";
import { ask, Refused } from "./feed.js";

export const STATES = {
  active: ["busy", "running"],
  done: ["good", "done"],
  recovered: ["warn", "recovered"],
  failed: ["bad", "failed"],
  cancelled: ["off", "client left"],
};
export const ROUTES = { pd: "prefill + decode", local: "consumer alone", cache: "cache hit", passthrough: "passed on" };
const EVERY = 2000;
const LIMIT = 100;
const FEW = 20;
const ms = (value) => (known(value) ? seconds(value / 1000) : "–");

export class Requests {
  constructor(open) {
    this.open = open;
    this.rows = new Map();
    this.records = [];
    this.body = $("#requests tbody");
    this.body.addEventListener("keydown", (event) => this.keys(event));
    $("#filter").addEventListener("input", () => this.show());
    this.all = false;
    $("#more").addEventListener("click", () => {
      this.all = !this.all;
      this.show();
    });
    this.asked = 0;
    this.rest = 0;
  }

  // Called with every picture; asks again only when something can have changed.
  async follow(picture) {
    const seen = JSON.stringify([picture.totals.requests, picture.totals.running]);
    const due = Date.now() - this.asked > EVERY;
    // Engines tell of a request a little after its end: the list is asked for twice more when all is quiet.
    if (seen !== this.seen || picture.totals.running) this.rest = 3;
    if (this.busy || !due || !this.rest) return;
    this.rest -= 1;
    this.busy = true;
    try {
      const reply = await (await ask(`admin/requests?limit=${LIMIT}`, AbortSignal.timeout(5000))).json();
      this.records = reply.requests;
      this.seen = seen;
      text($("#requests-note"), "");
      this.show();
    } catch (error) {
      text($("#requests-note"), error instanceof Refused ? error.message : "the list could not be had");
    } finally {
      this.asked = Date.now();
      this.busy = false;
    }
  }

  show() {
    const wanted = $("#filter").value.trim().toLowerCase();
    const fits = (r) => !wanted || [r.id, r.model, r.prefill, r.decode, r.route, ROUTES[r.route], r.state, r.session, r.tenant].some((v) => v?.toLowerCase().includes(wanted));
    const fitting = this.records.filter(fits);
    const records = this.all ? fitting : fitting.slice(0, FEW);
    $("#more").hidden = fitting.length <= FEW;
    text($("#more"), this.all ? `Only the latest ${FEW}` : `Show all ${fitting.length}`);
    const keep = new Set();
    let before = null;
    for (const record of records) {
      const id = `${record.received} ${record.id}`;
      keep.add(id);
      const row = this.rows.get(id) || this.make(id);
      row.fill(record);
      const place = before ? before.nextSibling : this.body.firstChild;
      if (place !== row.tr) this.body.insertBefore(row.tr, place);
      before = row.tr;
    }
    for (const [id, row] of this.rows) {
      if (!keep.has(id)) {
        row.tr.remove();
        this.rows.delete(id);
      }
    }
    $("#no-requests").hidden = records.length > 0;
    text($("#no-requests"), this.records.length ? "No request fits the filter." : "No requests yet.");
    this.rove();
  }

  // One row is in the tab order; arrows go to the others.
  rove(to) {
    const buttons = [...this.body.querySelectorAll("button")];
    const current = to || buttons.find((button) => button.tabIndex === 0) || buttons[0];
    for (const button of buttons) button.tabIndex = button === current ? 0 : -1;
    if (to) to.focus();
  }

  keys(event) {
    const buttons = [...this.body.querySelectorAll("button")];
    const at = buttons.indexOf(document.activeElement);
    const step = { ArrowDown: 1, ArrowUp: -1, PageDown: 10, PageUp: -10, Home: -buttons.length, End: buttons.length }[event.key];
    if (at < 0 || !step) return;
    event.preventDefault();
    this.rove(buttons[Math.max(0, Math.min(buttons.length - 1, at + step))]);
  }

  make(id) {
    const cell = (name, css = "") => h("td", { class: css, "data-name": name });
    const cells = {
      state: cell("State"),
      id: cell("Request", "id"),
      time: cell("Time", "quiet-cell"),
      path: cell("Path"),
      prompt: cell("Prompt", "number"),
      cached: cell("From cache"),
      output: cell("Output", "number"),
      first: cell("First token", "number"),
      total: cell("Total", "number"),
    };
    let record = null;
    const button = h("button", { type: "button", class: "link-button", "aria-haspopup": "dialog" });
    cells.id.append(button);
    const tr = h("tr", { onclick: () => (this.rove(button), this.open(record)) }, ...Object.values(cells));
    const share = h("span", { class: "share" });
    const said = h("span", {});
    cells.cached.append(share, said);
    const row = { tr, fill: (now) => fill((record = now)) };
    let shown = "";
    function fill(now) {
      if (shown === JSON.stringify(now)) return;
      shown = JSON.stringify(now);
      const [kind, word] = STATES[now.state] || ["off", now.state];
      cells.state.replaceChildren(state(kind, word));
      tr.dataset.request = now.id;
      text(button, now.id);
      button.title = now.id;
      text(cells.time, clock(now.received));
      cells.path.replaceChildren(h("span", {}, ROUTES[now.route] || now.route), h("small", {}, [now.prefill, now.decode].filter(Boolean).join(" → ")));
      text(cells.prompt, exact(now.prompt_tokens));
      const hits = Object.entries(now.cached_tokens || {}).filter(([, tokens]) => tokens > 0);
      const all = hits.reduce((sum, [, tokens]) => sum + tokens, 0);
      share.replaceChildren(...hits.map(([tier, tokens]) => h("i", { class: `source-${source(tier)}`, style: { width: `${(100 * tokens) / (now.prompt_tokens || all)}%` } })));
      share.hidden = !all;
      text(said, now.cached_tokens ? (all ? hits.map(([tier, tokens]) => `${count(tokens)} ${tier}`).join(", ") : "none") : "–");
      text(cells.output, exact(now.output_tokens));
      text(cells.first, ms(now.ttft_ms));
      text(cells.total, ms(now.duration_ms));
    }
    this.rows.set(id, row);
    return row;
  }
}

const SOURCES = new Set(["gpu", "dram", "disk", "redis", "s3", "mooncake", "fs", "peer", "computed"]);
export const source = (name) => (SOURCES.has(name) ? name : "other");
