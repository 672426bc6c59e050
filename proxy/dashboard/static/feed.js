// The connection to the proxy: one overview, then server-sent events, read with fetch because EventSource cannot send
// the admin key. Reconnects by itself, a little later each time.

const KEY = "pdserve-admin-key";
const SILENT = 15000; // the server says something every five seconds
const FIRST_WAIT = 500;
const LONGEST_WAIT = 10000;

export const key = {
  get: () => sessionStorage.getItem(KEY) || "",
  set: (value) => sessionStorage.setItem(KEY, value),
  forget: () => sessionStorage.removeItem(KEY),
};

export class Refused extends Error {
  constructor(status, message) {
    super(message);
    this.status = status;
  }
}

export async function ask(path, signal) {
  const headers = key.get() ? { authorization: `Bearer ${key.get()}` } : {};
  const reply = await fetch(path, { headers, signal, cache: "no-store" });
  if (reply.ok) return reply;
  const body = await reply.json().catch(() => ({}));
  throw new Refused(reply.status, body?.error?.message || `${path} answered ${reply.status}`);
}

export class Feed {
  // told: {overview(data), picture(data), waiting(untilMs, why), refused(status, message)}
  constructor(told) {
    this.told = told;
    this.wait = FIRST_WAIT;
    this.running = null;
  }

  start() {
    this.stop();
    this.running = new AbortController();
    this.wait = FIRST_WAIT;
    this.loop(this.running);
  }

  stop() {
    this.running?.abort();
    this.running = null;
  }

  async loop(mine) {
    while (!mine.signal.aborted) {
      let why = "the proxy ended the connection";
      try {
        await this.once(mine);
      } catch (error) {
        if (mine.signal.aborted) return;
        if (error instanceof Refused && (error.status === 401 || error.status === 403)) {
          return this.told.refused(error.status, error.message);
        }
        why = error instanceof Refused ? error.message : "the proxy does not answer";
      }
      const pause = this.wait * (0.8 + 0.4 * Math.random());
      this.wait = Math.min(LONGEST_WAIT, this.wait * 2);
      this.told.waiting(Date.now() + pause, why);
      await new Promise((resolve) => setTimeout(resolve, pause));
    }
  }

  async once(mine) {
    const line = new AbortController();
    const end = () => line.abort();
    mine.signal.addEventListener("abort", end);
    let watchdog = setTimeout(end, SILENT);
    const alive = () => {
      clearTimeout(watchdog);
      watchdog = setTimeout(end, SILENT);
    };
    try {
      this.told.overview(await (await ask("admin/overview", line.signal)).json());
      const reply = await ask("admin/events", line.signal);
      const reader = reply.body.pipeThrough(new TextDecoderStream()).getReader();
      let rest = "";
      for (;;) {
        const { value, done } = await reader.read();
        if (done) return;
        alive();
        rest += value;
        const events = rest.split("\n\n");
        rest = events.pop();
        for (const event of events) {
          const data = event.split("\n").find((part) => part.startsWith("data: "));
          if (data) {
            this.wait = FIRST_WAIT;
            this.told.picture(JSON.parse(data.slice(6)));
          }
        }
      }
    } finally {
      clearTimeout(watchdog);
      mine.signal.removeEventListener("abort", end);
      end();
    }
  }
}
