// Puts the parts together: what comes in from the feed goes to tiles, topology, charts and requests.

import { Charts } from "./charts.js";
import { Detail } from "./detail.js";
import { $, duration, state, text } from "./dom.js";
import { Feed, key } from "./feed.js";
import { Requests } from "./requests.js";
import { Tiles } from "./tiles.js";
import { Topology } from "./topology.js";

const STALE = 5000; // without a new picture; they come every second
const tiles = new Tiles();
const topology = new Topology();
const charts = new Charts();
const detail = new Detail();
const requests = new Requests((record) => detail.open(record));

let picture = null;
let sample = {};
let heard = 0; // when the last picture came, by this machine's clock
let wait = null; // {until, why} while there is no connection

function took(now) {
  picture = now;
  heard = Date.now();
  wait = null;
  if (now.sample) {
    sample = now.sample;
    charts.add(now.sample);
  }
  show();
}

function show() {
  $("#login").hidden = true;
  $("#content").hidden = false;
  $("#leave").hidden = !key.get();
  text($("#deployment"), picture.deployment || picture.engines.flatMap((engine) => engine.models)[0] || "");
  document.title = `${picture.deployment || "pdserve"} · pdserve`;
  $("#overall").replaceChildren(overall(picture));
  tiles.show(picture, sample);
  topology.show(picture);
  charts.show(picture.at);
  requests.follow(picture);
  text($("#about"), `pdserve ${picture.version}${picture.workers > 1 ? ` · ${picture.workers} workers` : ""} · percentiles are of the last 30 s`);
  age();
}

function overall(now) {
  const parts = [...now.engines, ...now.caches];
  const down = parts.filter((part) => part.state === "down").map((part) => part.name);
  const other = parts.filter((part) => part.state !== "down" && part.state !== "up").map((part) => part.name);
  if (!now.engines.some((engine) => engine.role !== "prefill" && engine.state !== "down")) return state("bad", "nobody can answer");
  if (down.length) return state("bad", `${down.slice(0, 3).join(", ")}${down.length > 3 ? ` and ${down.length - 3} more` : ""} down`);
  return other.length ? state("busy", `${other[0]} not yet settled`) : state("good", "all up");
}

// How old what one sees is: said once a second, whatever comes in or not.
function age() {
  if (!heard) {
    if (wait) notice(`No connection: ${wait.why}. ${again()}`);
    return;
  }
  const old = Date.now() - heard;
  const stale = old > STALE;
  document.body.classList.toggle("stale", stale);
  $("#live").replaceChildren(stale ? state("warn", `stale, ${duration(old / 1000)} old`) : wait ? state("busy", "reconnecting") : state("good", "live"));
  notice(stale ? `This is how it was ${duration(old / 1000)} ago${wait ? `: ${wait.why}. ${again()}` : ": nothing new has come since."}` : "");
}

const again = () => {
  const left = Math.ceil((wait.until - Date.now()) / 1000);
  return left > 0 ? `Trying again in ${left} s.` : "Trying again…";
};

function notice(words) {
  $("#notice").hidden = !words;
  text($("#notice"), words);
}

const feed = new Feed({
  overview: (data) => {
    charts.set(data.samples);
    sample = data.samples.at(-1) || {};
    took(data.picture);
  },
  picture: took,
  waiting: (until, why) => {
    wait = { until, why };
    age();
  },
  refused: (status, message) => {
    heard = 0;
    $("#content").hidden = true;
    $("#live").replaceChildren();
    $("#overall").replaceChildren();
    notice(status === 403 ? message : "");
    $("#login").hidden = status !== 401;
    text($("#login-error"), key.get() ? message : "");
    if (status === 401) $("#key").focus();
  },
});

$("#login").addEventListener("submit", (event) => {
  event.preventDefault();
  key.set($("#key").value);
  $("#key").value = "";
  feed.start();
});
$("#leave").addEventListener("click", () => {
  key.forget();
  feed.start();
});

// The theme: as the system has it, or the one of the two that was chosen here.
const THEMES = ["auto", "light", "dark"];
function theme(chosen) {
  if (chosen === "auto") delete document.documentElement.dataset.theme;
  else document.documentElement.dataset.theme = chosen;
  text($("#theme"), { auto: "◐ Auto", light: "☀ Light", dark: "☾ Dark" }[chosen]);
  $("#theme").setAttribute("aria-label", `Theme: ${chosen}. Change it`);
}
$("#theme").addEventListener("click", () => {
  const next = THEMES[(THEMES.indexOf(document.documentElement.dataset.theme || "auto") + 1) % THEMES.length];
  theme(next);
  try {
    localStorage.setItem("pdserve-theme", next);
  } catch {
    // storage is switched off: the choice lasts as long as the page
  }
  charts.recolor();
});
theme(document.documentElement.dataset.theme || "auto");

$("#content").hidden = true;
setInterval(age, 1000);
feed.start();
