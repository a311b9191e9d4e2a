// One table: a chart over its windows, the windows, and its rows.
import { badge, count, grid, h, number, read, show, stateBadge, time } from "./dom.js";
import { chart } from "./chart.js";

const SHOWN = 50;

export function tablePage(main, live, name) {
  return new TablePage(main, name).update;
}

class TablePage {
  constructor(main, name) {
    this.name = name;
    this.path = `/api/tables/${encodeURIComponent(name)}`;
    this.choice = { column: null, windows: 60, q: "", window: null, pages: [null] };
    this.about = null;
    this.seen = null;
    this.busy = false;
    this.parts = { about: h("p", { class: "about" }), problem: h("div"), controls: h("div", { class: "controls" }), chart: h("div", { class: "chart-box" }),
      windows: h("div"), rows: h("div"), pager: h("div", { class: "pager" }) };
    const { about, problem, controls, chart: drawing, windows, rows, pager } = this.parts;
    drawing.addEventListener("click", this.onwindow);
    windows.addEventListener("click", this.onwindow);
    pager.addEventListener("click", this.onpager);
    main.append(h("h1", {}, name), about, problem, controls);
    this.windowed = h("section", {}, drawing, h("details", {}, h("summary", {}, "Windows as a table"), windows));
    main.append(this.windowed, h("section", {}, h("h2", {}, "Rows"), rows, pager));
  }

  update = (overview) => {
    const about = overview.tables.find((table) => table.name === this.name);
    if (!about) {
      show(this.parts.problem, h("p", { class: "empty" }, overview.ready
        ? `There is no table ${this.name}. There is: ${overview.tables.map((table) => table.name).join(", ") || "none"}.`
        : "The worker starts; tables are known once it has joined its group."));
      return;
    }
    if (!this.about) this.begin(about);
    // Only a new epoch can change what is shown.
    const tasks = overview.tasks.filter((task) => task.group === about.group);
    const epochs = tasks.map((task) => `${task.partition}:${task.epoch}:${task.phase}`).join(" ");
    if (epochs !== this.seen) {
      this.seen = epochs;
      this.refresh();
    }
  };

  begin(about) {
    this.about = about;
    this.windowed.hidden = about.kind !== "windowed";
    this.choice.column = about.numeric?.[0] ?? null;
    const facts = about.kind === "windowed"
      ? [`${about.window} windows by ${Object.keys(about.keys).join(", ")}`, `allowed lateness ${about.allowed_lateness}`, `kept ${about.retain} after`]
      : ["written record by record by the app's agents"];
    show(this.parts.about, [...facts, `${about.partitions} partitions`, `sinks: ${about.sinks.join(", ") || "none"}`].join(" · "));
    show(this.parts.controls, this.controls());
  }

  controls() {
    const filter = h("input", { type: "search", id: "filter", placeholder: this.about.keys ? `part of ${Object.keys(this.about.keys).join(" or ")}` : "part of a key",
      autocomplete: "off", spellcheck: "false" });
    let waiting = null;
    filter.addEventListener("input", () => {
      clearTimeout(waiting);
      waiting = setTimeout(() => this.choose({ q: filter.value, pages: [null] }), 250);
    });
    const fields = [h("label", { for: "filter" }, "Filter by key"), filter];
    if (this.about.kind !== "windowed") return h("div", { class: "field" }, fields);
    return [
      this.select("Show", "column", this.about.numeric.map((column) => [column, column])),
      this.select("Windows", "windows", [[24, "last 24"], [60, "last 60"], [168, "last 168"], [500, "last 500"]]),
      h("div", { class: "field" }, fields),
    ];
  }

  select(label, field, options) {
    const list = h("select", { id: field, onchange: () => this.choose({ [field]: list.value }) },
      options.map(([value, text]) => h("option", { value, selected: String(value) === String(this.choice[field]) }, text)));
    return h("div", { class: "field" }, h("label", { for: field }, label), list);
  }

  choose(change) {
    Object.assign(this.choice, change);
    this.refresh();
  }

  // One question at a time; what was asked for meanwhile is asked once, after it.
  async refresh() {
    if (this.busy) {
      this.again = true;
      return;
    }
    this.busy = true;
    try {
      do {
        this.again = false;
        await this.draw();
      } while (this.again);
      if (!this.problem) show(this.parts.problem);
    } catch (failure) {
      show(this.parts.problem, h("p", { class: "empty bad" }, failure.message));
      this.seen = null; // asked again with the next event
    } finally {
      this.busy = false;
    }
  }

  async draw() {
    const { column, windows, q, window, pages } = this.choice;
    const rows = await read(`${this.path}/rows`, { q, window_start: window, after: pages[pages.length - 1], limit: SHOWN });
    if (this.about.kind === "windowed") this.drawWindows(await read(`${this.path}/windows`, { column, limit: windows, q }));
    this.drawRows(rows);
    const missing = rows.missing_partitions;
    this.problem = missing.length > 0;
    if (this.problem) {
      show(this.parts.problem, h("p", { class: "empty warn" }, `Partitions ${missing.join(", ")} are not shown: they start, restore or move. `, rows.problems.join(" ")));
    }
  }

  drawWindows(answer) {
    const { column, combined, windows } = answer;
    const value = (one) => (combined ? one[combined] : one.n ? one.sum / one.n : null);
    const many = windows.some((one) => one.rows > 1);
    const label = !many ? column : combined ? `${column}, ${{ sum: "all keys", min: "least of all keys", max: "greatest of all keys" }[combined]}` : `${column}, average of keys`;
    const points = windows.map((one) => ({ start: one.window_start, value: value(one), state: one.state, rows: one.rows })).reverse();
    show(this.parts.chart, h("h2", {}, label, " ", h("small", {}, this.hint(combined, many))), points.length
      ? chart(points, { kind: combined === "sum" ? "bars" : "line", label, size: this.about.window_ms, chosen: this.choice.window })
      : h("p", { class: "empty" }, answer.reached !== null ? "One window has too many rows to add up here; filter by a key or read it by its rows."
        : this.choice.q ? "No row's key holds this text." : "No window has rows yet: rows come with the first commit that holds one."));
    show(this.parts.windows, grid("Windows", [
      { title: "Window", cell: (one) => h("button", { type: "button", class: "plain", "data-start": one.window_start,
        "aria-pressed": String(one.window_start === this.choice.window) }, time(one.window_start)) },
      { title: "End", cell: (one) => time(one.window_end) },
      { title: "State", cell: (one) => stateBadge(one.state) },
      { title: "Rows", number: true, cell: (one) => number(one.rows) },
      { title: label, number: true, cell: (one) => number(value(one)) },
    ], windows, "No windows.", "tall"));
    if (!this.drawn && points.length) this.parts.chart.scrollLeft = this.parts.chart.scrollWidth; // the newest, where it is narrow
    this.drawn ||= points.length > 0;
  }

  hint(combined, many) {
    if (!combined && many) return "every key counts the same; filter by a key for its own value";
    return "open windows are lighter; choose a bar for its rows";
  }

  drawRows(answer) {
    const columns = this.about.kind === "windowed" ? this.windowedColumns() : [
      { title: "Key", cell: (one) => h("code", {}, JSON.stringify(one.row.key)) },
      { title: "Value", cell: (one) => h("code", {}, JSON.stringify(one.row.value)) },
      { title: "Partition", number: true, cell: (one) => one.partition },
    ];
    const { q, window, pages } = this.choice;
    show(this.parts.rows, grid("Rows", columns, answer.rows, answer.next !== null ? "No row fits among those looked at; Older looks further." : q || window !== null ? "No row fits what was chosen." : "No rows yet: the first comes with its first commit."));
    const turn = (text, act, possible) => h("button", { type: "button", "data-act": act, disabled: !possible }, text);
    this.next = answer.next;
    show(this.parts.pager, turn("Newer", "newer", pages.length > 1), turn("Older", "older", answer.next !== null),
      h("span", {}, `${count(answer.rows.length, "row")}${pages.length > 1 ? `, page ${pages.length}` : ""}`),
      window === null ? null : [badge(`window ${time(window)}`, "calm"), turn("All windows", "all", true)]);
  }

  onwindow = (event) => {
    const start = event.target.dataset?.start;
    if (start === undefined) return;
    this.choose({ window: Number(start) === this.choice.window ? null : Number(start), pages: [null] });
  };

  onpager = (event) => {
    const { pages } = this.choice;
    const act = { newer: { pages: pages.slice(0, -1) }, older: { pages: [...pages, this.next] }, all: { window: null, pages: [null] } };
    const change = act[event.target.dataset?.act];
    if (change) this.choose(change);
  };

  windowedColumns() {
    const cell = (name, dtype) => (one) => {
      const value = one.row[name];
      return value === null ? h("span", { class: "quiet" }, "null") : /Datetime/.test(dtype) ? time(value) : number(value);
    };
    const column = (sort) => ([name, dtype]) => ({ title: name, number: sort && /Int|Float/.test(dtype), cell: cell(name, dtype) });
    return [
      { title: "Window", cell: (one) => time(one.row.window_start) },
      ...Object.entries(this.about.keys).map(column(false)),
      ...Object.entries(this.about.columns).map(column(true)),
      { title: "State", cell: (one) => stateBadge(one.window) },
      { title: "Partition", number: true, cell: (one) => one.partition },
    ];
  }
}
