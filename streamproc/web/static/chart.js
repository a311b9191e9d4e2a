// One series over windows, as bars or as a line, and a sparkline. The same numbers stand in a table beside it.
import { number, s, short, time } from "./dom.js";

const SLOTS_MIN = 24, WIDTH = 1080, HEIGHT = 220, LEFT = 52, BOTTOM = 24, TOP = 12;

export function chart(points, { kind, label, size, chosen }) {
  const known = points.filter((point) => typeof point.value === "number");
  const [low, high] = range(known.map((point) => point.value), kind);
  const last = points[points.length - 1].start;
  const first = Math.min(points[0].start, last - (SLOTS_MIN - 1) * size);
  const slots = Math.round((last - first) / size) + 1;
  const step = (WIDTH - LEFT - 8) / slots;
  const x = (start) => LEFT + ((start - first) / size) * step;
  const y = (value) => TOP + (HEIGHT - TOP - BOTTOM) * (1 - (value - low) / (high - low || 1));
  const marks = kind === "bars"
    ? known.map((point) => bar(point, x(point.start), y, step, low, high))
    : [s("path", { class: "line", d: path(known, size, (point) => x(point.start) + step / 2, (point) => y(point.value)) }),
       known.map((point) => s("circle", { class: `dot ${point.state}`, cx: x(point.start) + step / 2, cy: y(point.value), r: 2.5 }))];
  const touch = points.map((point) => s("rect", {
    class: `touch${point.start === chosen ? " chosen" : ""}`, x: x(point.start), y: TOP, width: Math.max(step, 2), height: HEIGHT - TOP - BOTTOM,
    "data-start": point.start,
  }, s("title", {}, `${time(point.start)} · ${label} ${number(point.value)} · ${point.state} · ${point.rows} rows`)));
  return s("svg", { viewBox: `0 0 ${WIDTH} ${HEIGHT}`, class: "chart", role: "img",
    "aria-label": `${label} in ${points.length} windows from ${time(points[0].start)} to ${time(last)}; the table below has the numbers` },
    ticks(low, high).map((value) => [
      s("line", { class: "rule", x1: LEFT, x2: WIDTH - 8, y1: y(value), y2: y(value) }),
      s("text", { class: "tick", x: LEFT - 8, y: y(value) + 4, "text-anchor": "end" }, short(value))]),
    times(first, slots, size).filter((start) => x(start) < WIDTH - 80).map((start) =>
      s("text", { class: "tick", x: x(start), y: HEIGHT - 6 }, axis(start, size))),
    marks, touch);
}

function bar(point, x, y, step, low, high) {
  const zero = y(Math.min(Math.max(0, low), high)), top = y(point.value);
  return s("rect", { class: `bar ${point.state}`, x: x + step * 0.1, width: Math.max(step * 0.8, 1),
    y: Math.min(zero, top), height: Math.max(Math.abs(zero - top), 1) });
}

// A window without rows breaks the line: there is nothing between its neighbours.
function path(points, size, x, y) {
  let before = null, text = "";
  for (const point of points) {
    const pen = before !== null && point.start - before <= size ? "L" : "M";
    text += `${pen}${x(point).toFixed(1)} ${y(point).toFixed(1)}`;
    before = point.start;
  }
  return text;
}

function range(values, kind) {
  if (!values.length) return [0, 1];
  const low = Math.min(...values, kind === "bars" ? 0 : Infinity), high = Math.max(...values, kind === "bars" ? 0 : -Infinity);
  return low === high ? [Math.min(low, 0), Math.max(high, low === 0 ? 1 : 0)] : [low, high];
}

function ticks(low, high) {
  const rough = (high - low || 1) / 4, power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].map((factor) => factor * power).find((size) => size >= rough);
  const found = [];
  for (let value = Math.ceil(low / step) * step; value <= high + step / 1e6; value += step) found.push(Number(value.toPrecision(12)));
  return found;
}

function times(first, slots, size) {
  const every = Math.max(1, Math.ceil(slots / 9));
  return Array.from({ length: Math.ceil(slots / every) }, (_, at) => first + at * every * size);
}

const axis = (start, size) => (size >= 86400000 ? time(start).slice(0, 10) : time(start).slice(5, 16));

export function sparkline(values) {
  const width = 210, height = 30, high = Math.max(...values, 1);
  const step = width / Math.max(values.length - 1, 29);
  const points = values.map((value, at) => `${(width - (values.length - 1 - at) * step).toFixed(1)},${(height - 2 - (value / high) * (height - 4)).toFixed(1)}`);
  return s("svg", { viewBox: `0 0 ${width} ${height}`, width, height, class: "spark", "aria-hidden": "true" },
    s("line", { class: "rule", x1: 0, x2: width, y1: height - 1.5, y2: height - 1.5 }),
    s("polyline", { points: points.join(" ") }));
}

// The last windows of a table, small enough for a cell.
export function miniature(windows, value, size) {
  const width = 168, height = 30, last = windows[0].window_start;
  const first = Math.min(windows[windows.length - 1].window_start, last - (SLOTS_MIN - 1) * size);
  const slots = Math.round((last - first) / size) + 1;
  const high = Math.max(...windows.map(value), 0) || 1;
  return s("svg", { viewBox: `0 0 ${width} ${height}`, width, height, class: "spark", "aria-hidden": "true" },
    windows.map((one) => {
      const tall = Math.max((Math.max(value(one) ?? 0, 0) / high) * (height - 2), 1);
      return s("rect", { class: `bar ${one.state}`, x: (((one.window_start - first) / size) * width) / slots, y: height - tall,
        width: Math.max(width / slots - 1, 1), height: tall });
    }));
}
