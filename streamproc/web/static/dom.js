// Elements and formats. Text reaches the page as text nodes only, never as HTML.

const SVG = "http://www.w3.org/2000/svg";

function fill(element, attributes, children) {
  for (const [name, value] of Object.entries(attributes ?? {})) {
    if (value === null || value === undefined || value === false) continue;
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else element.setAttribute(name, value === true ? "" : value);
  }
  element.append(...children.flat(Infinity).filter((child) => child !== null && child !== undefined));
  return element;
}

export const h = (tag, attributes, ...children) => fill(document.createElement(tag), attributes, children);
export const s = (tag, attributes, ...children) => fill(document.createElementNS(SVG, tag), attributes, children);

// Makes the children of an element be these, changing what differs only: focus, selection and scrolling stay. Handlers
// belong on elements that are made once; what is drawn again says in data attributes what it stands for.
export function show(element, ...children) {
  const fresh = element.cloneNode(false);
  fill(fresh, {}, children);
  match(element, fresh);
}

function match(old, fresh) {
  const wanted = [...fresh.childNodes];
  wanted.forEach((child, at) => {
    const present = old.childNodes[at];
    if (!present) old.append(child);
    else if (present.nodeName !== child.nodeName) old.replaceChild(child, present);
    else if (child.nodeType === Node.TEXT_NODE) {
      if (present.data !== child.data) present.data = child.data;
    } else {
      attributes(present, child);
      match(present, child);
    }
  });
  while (old.childNodes.length > wanted.length) old.lastChild.remove();
}

function attributes(old, fresh) {
  for (const { name, value } of fresh.attributes) if (old.getAttribute(name) !== value) old.setAttribute(name, value);
  for (const { name } of [...old.attributes]) if (!fresh.hasAttribute(name)) old.removeAttribute(name);
}

const NUMBER = new Intl.NumberFormat("en", { maximumFractionDigits: 0 });
const FRACTION = new Intl.NumberFormat("en", { maximumSignificantDigits: 4 });

export function number(value) {
  if (value === null || value === undefined) return "–";
  if (typeof value !== "number") return String(value);
  return Number.isInteger(value) ? NUMBER.format(value) : FRACTION.format(value);
}

export function short(value) {
  if (value === null || value === undefined) return "–";
  for (const [size, unit] of [[1e9, "G"], [1e6, "M"], [1e4, "k"]]) {
    if (Math.abs(value) >= size) return FRACTION.format(Number((value / (unit === "k" ? 1e3 : size)).toPrecision(3))) + unit;
  }
  return number(Math.abs(value) < 100 ? Number(value.toPrecision(3)) : Math.round(value));
}

export function age(ms) {
  if (ms === null || ms === undefined) return "–";
  const sign = ms < 0 ? "−" : "";
  const seconds = Math.abs(ms) / 1000;
  if (seconds < 10) return `${sign}${seconds.toFixed(1)} s`;
  if (seconds < 120) return `${sign}${Math.round(seconds)} s`;
  if (seconds < 7200) return `${sign}${Math.round(seconds / 60)} min`;
  if (seconds < 172800) return `${sign}${Math.round(seconds / 3600)} h`;
  return `${sign}${number(Math.round(seconds / 86400))} d`;
}

// 2013-01-02 11:00, with seconds and milliseconds only where there are some.
export function time(ms) {
  if (ms === null || ms === undefined) return "–";
  const at = new Date(Number(ms));
  if (Number.isNaN(at.getTime())) return String(ms);
  const text = at.toISOString().replace("T", " ").replace("Z", "");
  return text.endsWith(":00.000") ? text.slice(0, -7) : text.endsWith(".000") ? text.slice(0, -4) : text;
}

// A sink's name where there is no room for its whole address: redis…/0, postgres…/public.
export function brief(name) {
  const parts = name.match(/^(\w+):\/\/(.*)$/);
  if (!parts || name.length <= 17) return name;
  const path = parts[2].split("/").filter(Boolean);
  const last = path.slice(-2).join("/");
  return parts[1] === "unix" ? last : `${parts[1].replace("postgresql", "postgres")}…/${path.at(-1)}`;
}

export const count = (amount, word) => `${short(amount)} ${word}${amount === 1 ? "" : "s"}`;
export const badge = (text, kind) => h("span", { class: `badge ${kind}` }, text);
export const stateBadge = (state) => badge(state, { open: "live", closed: "warn", final: "calm" }[state] ?? "calm");

// A table that scrolls sideways on its own, reachable by keyboard. Columns: {title, cell, number}.
export function grid(label, columns, rows, empty, style = "") {
  if (!rows.length) return h("p", { class: "empty" }, empty);
  const head = h("tr", {}, columns.map((column) => h("th", { scope: "col", class: column.number && "number" }, column.title)));
  const body = rows.map((row) => h("tr", { class: row.tone }, columns.map((column, at) => {
    const cell = column.cell(row);
    return h(at === 0 ? "th" : "td", { scope: at === 0 && "row", class: column.number && "number" }, cell ?? "–");
  })));
  return h("div", { class: `scroll ${style}`, tabindex: "0", role: "region", "aria-label": label },
    h("table", {}, h("caption", { class: "hidden" }, label), h("thead", {}, head), h("tbody", {}, body)));
}

export async function read(path, parameters) {
  const query = new URLSearchParams(Object.entries(parameters ?? {}).filter(([, value]) => value !== null && value !== ""));
  const response = await fetch(`${path}${query.size ? `?${query}` : ""}`);
  const answer = await response.json();
  if (!response.ok) throw new Error(answer.error?.message ?? `The worker answered ${response.status}.`);
  return answer;
}
