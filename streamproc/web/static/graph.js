// The pipeline as SVG: columns by distance from the source, rows in the order of declaration.
import { brief, s } from "./dom.js";

const WIDTH = 153, HEIGHT = 62, ACROSS = 34, DOWN = 18;

export function graph(data, metric, link) {
  const depth = depths(data);
  const columns = [];
  for (const node of data.nodes) (columns[depth.get(node.id)] ??= []).push(node);
  const tallest = Math.max(...columns.map((column) => column.length), 1);
  const height = tallest * (HEIGHT + DOWN) - DOWN;
  const at = new Map();
  columns.forEach((column, x) => {
    const offset = (height - (column.length * (HEIGHT + DOWN) - DOWN)) / 2;
    column.forEach((node, y) => at.set(node.id, [x * (WIDTH + ACROSS) + 2, offset + y * (HEIGHT + DOWN) + 2]));
  });
  const width = columns.length * (WIDTH + ACROSS) - ACROSS;
  return s("svg", { viewBox: `0 0 ${width + 4} ${height + 4}`, width: width + 4, height: height + 4, role: "group",
    "aria-label": describe(data), class: "graph" },
    data.edges.map((edge) => line(at.get(edge.from), at.get(edge.to))),
    data.nodes.map((node) => box(node, at.get(node.id), metric(node), link(node))));
}

function depths(data) {
  const depth = new Map(data.nodes.map((node) => [node.id, 0]));
  for (let round = 0; round < data.nodes.length; round++) {
    for (const { from, to } of data.edges) depth.set(to, Math.max(depth.get(to), depth.get(from) + 1));
  }
  return depth;
}

function line([x, y], [toX, toY]) {
  const [startX, startY, endY] = [x + WIDTH, y + HEIGHT / 2, toY + HEIGHT / 2];
  const middle = (startX + toX) / 2;
  return s("path", { class: "edge", d: `M${startX} ${startY}C${middle} ${startY} ${middle} ${endY} ${toX} ${endY}` });
}

function box(node, [x, y], metric, href) {
  const content = [
    s("title", {}, [node.kind, node.label, node.detail, metric].filter(Boolean).join(" · ")),
    s("rect", { width: WIDTH, height: HEIGHT, rx: 8 }),
    s("text", { class: "kind", x: 12, y: 17 }, fit(node.detail || node.kind, 23)),
    s("text", { class: "label", x: 12, y: 35 }, fit(node.kind === "sink" ? brief(node.label) : node.label, 17)),
    s("text", { class: "metric", x: 12, y: 52 }, fit(metric, 22)),
  ];
  const group = { class: `node ${node.kind}`, transform: `translate(${x} ${y})` };
  return href ? s("a", { ...group, href }, content) : s("g", group, content);
}

const fit = (text, most) => (text.length > most ? `${text.slice(0, most - 1)}…` : text);

function describe(data) {
  const label = new Map(data.nodes.map((node) => [node.id, node.label]));
  return `Pipeline: ${data.edges.map((edge) => `${label.get(edge.from)} to ${label.get(edge.to)}`).join(", ")}`;
}
