// The overview, once a second, and what follows from two of them: records per second.

const HISTORY = 120;

export class Live {
  constructor() {
    this.overview = null;
    this.rates = [];
    this.listeners = [];
    this.onstatus = () => {};
    this.last = new Map();
    this.connect();
  }

  connect() {
    const events = new EventSource("/api/events");
    events.addEventListener("overview", (event) => this.take(JSON.parse(event.data)));
    events.addEventListener("problem", (event) => this.onstatus("bad", JSON.parse(event.data).message));
    events.onerror = () => {
      this.onstatus("bad", "the worker does not answer, trying again");
      if (events.readyState === EventSource.CLOSED) setTimeout(() => this.connect(), 3000);
    };
  }

  take(overview) {
    const before = this.overview;
    this.overview = overview;
    this.measure(overview, before);
    const away = overview.workers.filter((worker) => worker.problem);
    if (away.length) this.onstatus("bad", away[0].problem);
    else if (!overview.ready) this.onstatus("warn", "starting");
    else this.onstatus("live", "live");
    for (const listener of this.listeners) listener(overview);
  }

  // A task counts from nought whenever it starts: what it has when it is new here, or fewer than before, is all gained.
  measure(overview, before) {
    let gained = 0;
    for (const task of overview.tasks) {
      if (!readsSource(overview, task)) continue;
      const key = `${task.group}:${task.partition}`;
      const known = this.last.get(key);
      if (before) gained += known !== undefined && task.records >= known ? task.records - known : task.records;
      this.last.set(key, task.records);
    }
    const seconds = before ? (overview.now - before.now) / 1000 : 0;
    if (seconds > 0.2) this.rates = [...this.rates, gained / seconds].slice(-HISTORY);
  }

  // Records per second over the last few seconds: commits come once a second, so one second alone jumps.
  get rate() {
    const recent = this.rates.slice(-4);
    return recent.length ? recent.reduce((sum, rate) => sum + rate, 0) / recent.length : null;
  }
}

// Tasks that read what users wrote; owners of tables read what these have shipped.
export const readsSource = (overview, task) =>
  overview.graph.nodes.some((node) => node.kind !== "table" && node.group === task.group);
