// One request: its facts, its way through time, and where each chunk of its prompt came from.

import { $, bytes, clock, exact, h, known, seconds, state } from "./dom.js";
import { ask, Refused } from "./feed.js";
import { ROUTES, source, STATES } from "./requests.js";

const EVERY = 1500;
const MOST_CHUNKS = 2048;
const SPANS = { queue: "Queue", prefill: "Prefill", transfer: "Transfer", load: "Load", first_token: "First token", decode: "Decode", store: "Store", retry: "Failed try" };
const LETTERS = { gpu: "G", dram: "M", disk: "D", redis: "R", s3: "S", mooncake: "K", fs: "F", peer: "P", computed: "C", other: "?" };
const NAMES = { gpu: "engine's own cache", dram: "memory", computed: "computed" };
const ms = (value) => (known(value) ? seconds(value / 1000) : "–");

export class Detail {
  constructor() {
    this.dialog = $("#detail");
    this.dialog.addEventListener("close", () => this.left());
    this.dialog.addEventListener("click", (event) => event.target === this.dialog && this.dialog.close());
  }

  open(record) {
    this.record = record;
    this.chosen = null;
    this.asked = 0;
    this.show(record, "");
    if (!this.dialog.open) this.dialog.showModal();
    this.load();
  }

  left() {
    clearTimeout(this.timer);
    this.record = null;
  }

  async load() {
    const id = this.record?.id;
    if (!id) return;
    let problem = "";
    try {
      const found = await (await ask(`admin/requests/${encodeURIComponent(id)}`, AbortSignal.timeout(5000))).json();
      if (this.record?.id !== id) return;
      this.record = found;
    } catch (error) {
      problem = error instanceof Refused ? error.message : "This request's story could not be had: the proxy does not answer.";
    }
    if (this.record?.id !== id) return;
    this.show(this.record, problem);
    const untold = !this.record.chunks && ++this.asked < 5; // engines tell of a request a moment after its end
    if (this.record.state === "active" || problem || untold) this.timer = setTimeout(() => this.load(), EVERY);
  }

  show(record, problem) {
    const asJson = JSON.stringify([record, problem]);
    if (asJson === this.shown && this.dialog.open) return;
    this.shown = asJson;
    const [kind, word] = STATES[record.state] || ["off", record.state];
    const hadFocus = this.dialog.contains(document.activeElement) && document.activeElement.dataset.focus;
    this.dialog.replaceChildren(
      h(
        "header",
        { class: "drawer-head" },
        h("div", {}, h("h2", { id: "detail-title" }, record.id), h("p", { class: "muted" }, state(kind, word), ` at ${clock(record.received)} · ${record.endpoint}`)),
        h("button", { class: "quiet", type: "button", "data-focus": "close", onclick: () => this.dialog.close() }, "Close"),
      ),
      problem ? h("p", { class: "notice", role: "alert" }, problem) : "",
      record.error ? h("p", { class: "notice" }, record.error) : "",
      facts(record),
      record.notes?.length ? h("ul", { class: "notes" }, ...record.notes.slice(0, 20).map((note) => h("li", {}, String(note)))) : "",
      h("h3", {}, "Timeline"),
      timeline(record),
      h("h3", {}, "Where the prompt came from"),
      this.chunks(record),
    );
    if (hadFocus) this.dialog.querySelector(`[data-focus="${CSS.escape(hadFocus)}"]`)?.focus();
  }

  chunks(record) {
    if (!record.chunks) return h("p", { class: "muted" }, record.spans === undefined ? "Asking…" : "Not told: no engine or cache daemon reported chunks of this request.");
    if (!record.chunks.length) return h("p", { class: "muted" }, "The prompt has no whole chunk: it is shorter than what the cache keeps.");
    const line = h("p", { class: "chunk-line", role: "status" });
    const shown = record.chunks.slice(0, MOST_CHUNKS);
    const say = (chunk) => (line.textContent = sentence(chunk));
    const squares = shown.map((chunk, i) => {
      const kind = source(chunk.source);
      const attributes = { type: "button", class: `chunk source-${kind}`, title: sentence(chunk), "aria-label": sentence(chunk), "data-focus": `chunk-${i}` };
      attributes.tabindex = i === 0 ? 0 : -1;
      return h("button", { ...attributes, onclick: () => say(chunk), onfocus: () => say(chunk) }, LETTERS[kind]);
    });
    const grid = h("div", { class: "chunk-grid", role: "group", "aria-label": "Chunks of the prompt, in order", onkeydown: (event) => arrows(event, squares) }, ...squares);
    line.textContent = "Choose a chunk to see why.";
    const left = record.chunks.length - shown.length;
    return h("div", {}, summary(record.chunks), grid, left ? h("p", { class: "muted" }, `and ${exact(left)} more`) : null, line);
  }
}

function arrows(event, squares) {
  const at = squares.indexOf(document.activeElement);
  const step = { ArrowRight: 1, ArrowLeft: -1, ArrowDown: 16, ArrowUp: -16, Home: -squares.length, End: squares.length }[event.key];
  if (at < 0 || !step) return;
  event.preventDefault();
  const next = squares[Math.max(0, Math.min(squares.length - 1, at + step))];
  squares[at].tabIndex = -1;
  next.tabIndex = 0;
  next.focus();
}

function sentence(chunk) {
  const where = chunk.source === "computed" ? "computed" : `from ${NAMES[chunk.source] || chunk.source}`;
  const why = chunk.why ? `: ${chunk.why}` : "";
  const key = chunk.key ? ` (key ${chunk.key})` : "";
  return `Chunk ${chunk.index}, tokens ${exact(chunk.first_token)} to ${exact(chunk.first_token + chunk.tokens - 1)}: ${where}${why}${key}`;
}

// How many tokens from where, and for what was computed, why.
function summary(chunks) {
  const groups = new Map();
  for (const chunk of chunks) {
    const id = `${chunk.source} ${chunk.why || ""}`;
    const group = groups.get(id) || { ...chunk, chunks: 0, tokens: 0 };
    group.chunks += 1;
    group.tokens += chunk.tokens;
    groups.set(id, group);
  }
  return h(
    "ul",
    { class: "sources" },
    ...[...groups.values()].slice(0, 12).map((group) => {
      const kind = source(group.source);
      const square = h("span", { class: `chunk source-${kind}`, "aria-hidden": "true" }, LETTERS[kind]);
      const what = `${exact(group.tokens)} tokens in ${exact(group.chunks)} ${group.chunks === 1 ? "chunk" : "chunks"}`;
      return h("li", {}, square, h("b", {}, NAMES[group.source] || group.source), h("span", {}, what), h("span", { class: "muted" }, group.why || ""));
    }),
  );
}

function facts(record) {
  const cached = Object.entries(record.cached_tokens || {}).filter(([, tokens]) => tokens > 0);
  const rows = [
    ["Path", `${ROUTES[record.route] || record.route}${record.reason ? ` (${record.reason})` : ""}`],
    ["Engines", [record.prefill, record.decode].filter(Boolean).join(" → ")],
    ["Model", record.model],
    ["Status", record.status],
    ["Prompt", known(record.prompt_tokens) ? `${exact(record.prompt_tokens)} tokens` : null],
    ["From cache", record.cached_tokens ? cached.map(([tier, tokens]) => `${exact(tokens)} ${tier}`).join(", ") || "none" : null],
    ["Answer", known(record.output_tokens) ? `${exact(record.output_tokens)} ${record.output_tokens === 1 ? "token" : "tokens"}${record.finish_reason ? `, ended by ${record.finish_reason}` : ""}` : null],
    ["First token", known(record.ttft_ms) ? ms(record.ttft_ms) : null],
    ["Total", ms(record.duration_ms)],
    ["Loading", known(record.load_ms) ? ms(record.load_ms) : null],
    ["Computing saved", known(record.saved_ms) ? ms(record.saved_ms) : null],
    ["Session", record.session],
    ["Tenant", record.tenant],
    ["Recoveries", record.recoveries || null],
    ["Trace", record.trace_id],
  ];
  return h("dl", { class: "record" }, ...rows.filter(([, value]) => value !== null && value !== undefined && value !== "").map(([name, value]) => h("div", {}, h("dt", {}, name), h("dd", {}, String(value)))));
}

function timeline(record) {
  if (!record.spans) return h("p", { class: "muted" }, "Asking…");
  if (!record.spans.length) return h("p", { class: "muted" }, "Nothing has begun yet.");
  const end = Math.max(record.duration_ms || 0, ...record.spans.map((span) => span.start_ms + (span.ms || 0)), 0.001);
  const share = (value) => `${(100 * value) / end}%`;
  const marks = [0, 0.25, 0.5, 0.75, 1].map((part) => h("span", { style: { left: `${part * 100}%` } }, ms(part * end)));
  return h(
    "div",
    { class: "timeline" },
    h("div", { class: "axis", "aria-hidden": "true" }, ...marks),
    h(
      "ol",
      {},
      ...record.spans.map((span) => {
        const more = [span.tier, known(span.tokens) ? `${exact(span.tokens)} tokens` : null, known(span.bytes) ? bytes(span.bytes) : null, span.detail].filter(Boolean).join(", ");
        const name = SPANS[span.name] || span.name;
        const bar = h("span", { class: `span span-${SPANS[span.name] ? span.name : "other"}`, style: { left: share(span.start_ms), width: `max(2px, ${share(span.ms || 0)})` } });
        const when = `${ms(span.ms)}, from ${ms(span.start_ms)}`;
        return h("li", { title: `${name} on ${span.instance}: ${when}${more ? `; ${more}` : ""}` }, h("span", { class: "span-name" }, h("b", {}, name), " ", span.instance || ""), h("span", { class: "lane" }, bar), h("span", { class: "span-time" }, ms(span.ms)), more ? h("span", { class: "span-more" }, more) : null);
      }),
    ),
  );
}
