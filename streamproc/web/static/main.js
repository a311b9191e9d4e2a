// Which page the address means; navigation and status around it.
import { h, show } from "./dom.js";
import { Live } from "./live.js";
import { overviewPage } from "./overview.js";
import { sidePage } from "./side.js";
import { tablePage } from "./table.js";

const main = document.getElementById("main");
const status = document.getElementById("status");
const live = new Live();
const [, page, name] = location.pathname.replace(/^\/streamproc/, "").split("/").map(decodeURIComponent);

live.onstatus = (tone, text) => {
  status.className = `status ${tone}`;
  show(status, text);
};
live.listeners.push(around, page === "tables" ? tablePage(main, live, name) : page === "side" ? sidePage(main) : overviewPage(main, live));

function around(overview) {
  document.title = `${name ?? (page === "side" ? "side topics" : "overview")} · ${overview.app}`;
  show(document.getElementById("app"), overview.app);
  const link = (href, text) => h("a", { href, "aria-current": decodeURIComponent(location.pathname) === decodeURIComponent(href) && "page" }, text);
  show(document.getElementById("nav"), link("/streamproc/", "Overview"),
    overview.tables.map((table) => link(`/streamproc/tables/${encodeURIComponent(table.name)}`, table.name)),
    link("/streamproc/side", "Dead letters & late"));
}
