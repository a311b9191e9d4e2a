// Dead letters and late records: why, and where they came from. Payloads stay in the log.
import { age, grid, h, number, read, show, time } from "./dom.js";

const EVERY_MS = 3000;

export function sidePage(main) {
  const problem = h("div"), topics = h("div");
  main.append(h("h1", {}, "Dead letters and late records"),
    h("p", { class: "about" }, "The last records of each side topic. Only sizes and our own headers are shown: the payload may hold personal data and is read with the consumer of your choice."),
    problem, topics);
  const refresh = async () => {
    try {
      const answer = await read("/api/side");
      show(problem, answer.problem ? h("p", { class: "empty warn" }, answer.problem) : null);
      show(topics, answer.topics.length ? answer.topics.map(section) : h("p", { class: "empty" }, "The app has no side topics yet."));
    } catch (failure) {
      show(problem, h("p", { class: "empty bad" }, failure.message));
    }
    setTimeout(refresh, EVERY_MS);
  };
  refresh();
  return () => {};
}

function section(topic) {
  const late = topic.kind === "late records";
  return h("section", {},
    h("h2", {}, topic.topic, " ", h("small", {}, `${topic.kind} of ${topic.of}`)),
    topic.records.length ? reasons(topic) : null,
    grid(topic.topic, late ? lateColumns() : deadColumns(), topic.records,
      late ? "Nothing was late: every record came before its window was final." : "No dead letters: every record could be read and met its expectations.", "tall"));
}

function reasons(topic) {
  const counts = new Map();
  for (const record of topic.records) counts.set(record.reason ?? "?", (counts.get(record.reason ?? "?") ?? 0) + 1);
  const listed = [...counts].sort((one, two) => two[1] - one[1]);
  return h("ul", { class: "reasons", "aria-label": `Reasons of the last ${topic.records.length} records` },
    listed.slice(0, 8).map(([reason, count]) => h("li", {}, h("strong", {}, number(count)), ` ${reason}`)),
    listed.length > 8 ? h("li", { class: "quiet" }, `and ${listed.length - 8} more`) : null,
    topic.cut ? h("li", { class: "quiet" }, "records are large: some of the last are not shown") : null);
}

const place = (record) => (record.partition === undefined ? null : `${record.topic ?? "upstream task"} ${record.partition}:${record.offset ?? "?"}`);
const size = (bytes) => (bytes === null ? "null" : `${number(bytes)} B`);

const deadColumns = () => [
  { title: "Written", cell: (record) => time(record.written).slice(0, 19) },
  { title: "Reason", cell: (record) => record.reason },
  { title: "Source", cell: place },
  { title: "Record time", cell: (record) => time(record.time) },
  { title: "Schema id", number: true, cell: (record) => record.schema_id },
  { title: "Key", number: true, cell: (record) => size(record.key_bytes) },
  { title: "Value", number: true, cell: (record) => size(record.value_bytes) },
];

const lateColumns = () => [
  { title: "Written", cell: (record) => time(record.written).slice(0, 19) },
  { title: "Reason", cell: (record) => record.reason },
  { title: "Table", cell: (record) => record.table },
  { title: "Window", cell: (record) => (record.window_start === undefined ? null : time(record.window_start)) },
  { title: "Late by", number: true, cell: (record) => (record.late_by_ms === undefined ? null : age(record.late_by_ms)) },
  { title: "Source", cell: place },
  { title: "Value", number: true, cell: (record) => size(record.value_bytes) },
];
