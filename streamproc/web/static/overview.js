// The app at one glance: figures, graph, tables, tasks.
import { age, badge, brief, count, grid, h, number, read, short, show, time } from "./dom.js";
import { miniature, sparkline } from "./chart.js";
import { graph } from "./graph.js";
import { readsSource } from "./live.js";

const sum = (tasks, field) => tasks.reduce((total, task) => total + (task[field] ?? 0), 0);

export function overviewPage(main, live) {
  const parts = { figures: h("div", { class: "figures" }), graph: h("div", { class: "scroll drawing", tabindex: "0", role: "region", "aria-label": "Pipeline graph" }),
    tables: h("div"), tasks: h("div") };
  main.append(
    h("h1", { class: "hidden" }, "Overview"), parts.figures,
    h("section", {}, h("h2", {}, "Pipeline"), parts.graph),
    h("section", {}, h("h2", {}, "Tables"), parts.tables),
    h("section", {}, h("h2", {}, "Tasks"), parts.tasks));
  const last = new LastWindows();
  return (overview) => {
    show(parts.figures, figures(overview, live));
    show(parts.graph, overview.graph.nodes.length
      ? graph(overview.graph, (node) => metric(overview, node), link)
      : h("p", { class: "empty" }, "Nothing is declared yet, or the worker has not joined its group."));
    last.renew(overview);
    show(parts.tables, tables(overview, last));
    show(parts.tasks, tasks(overview));
  };
}

// The last windows of each table, asked for when it has a new epoch, one table at a time.
class LastWindows {
  constructor() {
    this.known = new Map();
    this.seen = new Map();
    this.busy = false;
  }

  async renew(overview) {
    if (this.busy) return;
    this.busy = true;
    for (const table of overview.tables.filter((one) => one.kind === "windowed")) {
      const epochs = overview.tasks.filter((task) => task.group === table.group).map((task) => task.epoch).join(" ");
      if (this.seen.get(table.name) === epochs) continue;
      try {
        this.known.set(table.name, await read(`/api/tables/${encodeURIComponent(table.name)}/windows`, { limit: 40 }));
        this.seen.set(table.name, epochs);
      } catch {
        // The table's own page says why; here the last picture stays.
      }
    }
    this.busy = false;
  }

  picture(table) {
    const answer = this.known.get(table.name);
    if (!answer?.windows.length) return h("span", { class: "quiet" }, table.kind === "windowed" ? "no windows yet" : "none");
    const newest = answer.windows[0];
    const value = (one) => (answer.combined ? one[answer.combined] : one.n ? one.sum / one.n : null);
    return h("div", { class: "picture" }, miniature(answer.windows, value, table.window_ms),
      h("small", {}, `${answer.column} ${short(value(newest))} at ${time(newest.window_start).slice(5)}`));
  }
}

function figures(overview, live) {
  const readers = overview.tasks.filter((task) => readsSource(overview, task));
  const expected = Object.values(overview.groups).reduce((total, count) => total + count, 0);
  const running = overview.tasks.filter((task) => task.phase === "running").length;
  const lags = readers.map((task) => task.lag).filter((lag) => lag !== null);
  const commits = overview.tasks.map((task) => task.commit_age_ms).filter((ms) => ms !== null);
  const dead = sum(overview.tasks, "dead"), late = sum(overview.tasks, "late");
  return [
    figure("Throughput", [short(live.rate), h("small", {}, " records/s")], sparkline(live.rates)),
    figure("Records", short(sum(readers, "records")), "committed since start"),
    figure("Lag", lags.length ? short(lags.reduce((total, lag) => total + lag, 0)) : "–", "records behind the last commit"),
    figure("Last commit", commits.length ? age(Math.min(...commits)) : "–", "ago; no commit without news"),
    figure("Dead letters", short(dead), h("a", { href: "/streamproc/side" }, "see why"), dead ? "warn" : ""),
    figure("Late", short(late), h("a", { href: "/streamproc/side" }, "see which"), late ? "warn" : ""),
    figure("Tasks", `${running}/${expected}`, count(overview.workers.length, "worker"),
      running < expected ? "bad" : ""),
  ];
}

const figure = (title, value, note, tone) =>
  h("div", { class: `figure ${tone ?? ""}` }, h("h3", {}, title), h("p", { class: "value" }, value), h("p", { class: "note" }, note));

function metric(overview, node) {
  const tasks = overview.tasks.filter((task) => task.group === node.group);
  switch (node.kind) {
    case "source": return tasks.length ? count(sum(tasks, "records"), "record") : "";
    case "agent": return count(sum(tasks, "records"), "record");
    case "step": return { expect: count(sum(tasks, "dead"), "dead letter"), dedupe: count(sum(tasks, "duplicates"), "duplicate"),
      filter: `${short(sum(tasks, "filtered"))} filtered out` }[node.label] ?? "";
    case "table": return `${short(overview.tasks.reduce((total, task) => total + (task.late_by_table[node.label] ?? 0), 0))} late`;
    case "sink": {
      const sinks = overview.tasks.flatMap((task) => task.sinks).filter((sink) => sink.name === node.label);
      if (sinks.some((sink) => sink.problem)) return "down";
      const behind = Math.max(0, ...sinks.map((sink) => sink.epochs_behind));
      return sinks.length ? (behind ? `${count(behind, "epoch")} behind` : "up to date") : "not started";
    }
    default: return "";
  }
}

const link = (node) => (node.kind === "table" ? `/streamproc/tables/${encodeURIComponent(node.label)}` : null);

function tables(overview, last) {
  return grid("Tables", [
    { title: "Table", cell: (table) => h("a", { href: `/streamproc/tables/${encodeURIComponent(table.name)}` }, table.name) },
    { title: "Kind", cell: (table) => table.window ?? "per record" },
    { title: "Keys", cell: (table) => (table.keys ? Object.keys(table.keys).join(", ") : "any") },
    { title: "Last windows", cell: (table) => last.picture(table) },
    { title: "Watermark", cell: (table) => watermark(lowest(overview.tasks.filter((task) => task.group === table.group))) },
    { title: "Sinks", cell: (table) => table.sinks.map(brief).join(", ") || h("span", { class: "quiet" }, "none") },
  ], overview.tables, "No table is declared: end a pipeline with .table(…), or write to an app.Table.");
}

// A table is as far as its slowest partition.
function lowest(tasks) {
  const known = tasks.filter((task) => task.watermark !== null);
  if (tasks.some((task) => task.watermark_note === "none yet")) return { watermark_note: "none yet" };
  return known.reduce((least, task) => (least === null || task.watermark < least.watermark ? task : least), null) ?? tasks[0] ?? {};
}

function watermark(task) {
  if (task.watermark === null || task.watermark === undefined) return h("span", { class: "quiet" }, task.watermark_note ?? "none");
  return [time(task.watermark).slice(0, 19), " ", h("small", {}, `${age(task.watermark_age_ms)} ago`)];
}

function tasks(overview) {
  const held = new Set(overview.tasks.map((task) => `${task.group}:${task.partition}`));
  const absent = Object.entries(overview.groups).flatMap(([group, count]) => Array.from({ length: count }, (_, partition) => partition)
    .filter((partition) => !held.has(`${group}:${partition}`))
    .map((partition) => ({ group, partition, phase: "nowhere", sinks: [], problem: "no worker that can be asked holds it", tone: "bad" })));
  const columns = [
    { title: "Task", cell: (task) => `${task.group}:${task.partition}` },
    { title: "Phase", cell: (task) => badge(task.phase, { running: "live", held: "warn", nowhere: "bad" }[task.phase] ?? "warn") },
    { title: "Records", number: true, cell: (task) => number(task.records) },
    { title: "Lag", number: true, cell: (task) => number(task.lag) },
    { title: "Watermark", cell: watermark },
    { title: "Epoch", number: true, cell: (task) => number(task.epoch) },
    { title: "Commit age", number: true, cell: (task) => age(task.commit_age_ms) },
    { title: "Restarts", number: true, cell: (task) => number(task.restarts) },
    { title: "Sinks", cell: sinks },
    { title: "Problem", cell: problem },
  ];
  if (overview.workers.length > 1) columns.splice(2, 0, { title: "Worker", cell: (task) => task.worker?.replace(/^https?:\/\//, "") });
  return grid("Tasks", columns, [...overview.tasks, ...absent], "No task yet: the worker has not been assigned a partition.");
}

function sinks(task) {
  if (!task.sinks.length) return h("span", { class: "quiet" }, "none");
  return task.sinks.map((sink) => h("div", { title: sink.name }, `${brief(sink.name)} `, sink.problem ? badge("down", "bad")
    : sink.epochs_behind ? badge(`${sink.epochs_behind} behind`, "warn") : badge("up to date", "live")));
}

function problem(task) {
  if (task.restore) {
    const { position, target, records_per_s: rate } = task.restore;
    return `restoring ${number(position)} of ${number(target)}, ${short(rate)} records/s`;
  }
  return task.problem ?? task.sinks.find((sink) => sink.problem)?.problem ?? h("span", { class: "quiet" }, "none");
}
