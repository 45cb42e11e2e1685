"use strict";
// Every text from the data enters the page through textContent or setAttribute, never as markup.
const data = JSON.parse(document.getElementById("data").textContent);
const byId = (id) => document.getElementById(id);
const SVG = "http://www.w3.org/2000/svg";
// Black is the page's ink, which is light on a dark page.
const LOOKS = new Map(data.looks.map((look) => [look.kind, { ...look, colour: look.colour === "#000000" ? "currentColor" : look.colour }]));
const lookOf = (row) => LOOKS.get(row.kind) || { colour: "#777777", marker: "o" };

function make(tag, attributes = {}, text = null, parent = null) {
  const svg = ["svg", "path", "line", "text", "title"].includes(tag);
  const element = svg ? document.createElementNS(SVG, tag) : document.createElement(tag);
  for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
  if (text !== null) element.textContent = text;
  if (parent) parent.append(element);
  return element;
}

function list(parent, items) {
  for (const item of items) make("li", {}, item, parent);
}

function shown(value) {
  if (value === null || value === undefined || value === "") return "–";
  if (typeof value !== "number") return String(value);
  const size = Math.abs(value);
  if (size >= 1e12) return value.toExponential(2);
  for (const [unit, scale] of [["G", 1e9], ["M", 1e6], ["k", 1e4]]) {
    if (size >= scale) return `${Number((value / (unit === "k" ? 1e3 : scale)).toPrecision(3))}${unit}`;
  }
  return String(Number(value.toPrecision(4)));
}

// ---- chart ----
const levels = { arms: data.arms, runs: data.runs };
const state = { level: "arms", task: null, x: "trainable_parameters", y: data.metric, log: true, front: true, hidden: {} };

function rowsOf(level) {
  const columns = levels[level];
  const names = Object.keys(columns);
  const count = names.length ? columns[names[0]].length : 0;
  return Array.from({ length: count }, (_, i) => Object.fromEntries(names.map((name) => [name, columns[name][i]])));
}
const rows = { arms: rowsOf("arms"), runs: rowsOf("runs") };

function numeric(level) {
  return Object.keys(levels[level]).filter((name) => !/_(low|high)$/.test(name) && name !== "on_front" &&
    levels[level][name].some((value) => typeof value === "number"));
}

function choice(form, name, label, options, value, change) {
  const box = make("label", {}, label + " ", form);
  const select = make("select", { id: "choose-" + name }, null, box);
  for (const [key, text] of options) make("option", { value: key }, text, select);
  select.value = value;
  select.addEventListener("change", () => { change(select.value); draw(); });
  return select;
}

function tick(form, name, label, change) {
  const box = make("label", {}, null, form);
  const input = make("input", { type: "checkbox", id: "choose-" + name }, null, box);
  input.checked = state[name];
  make("span", {}, label, box);
  input.addEventListener("change", () => { change(input.checked); draw(); });
}

function controls() {
  const form = byId("controls");
  form.replaceChildren();
  form.addEventListener("submit", (event) => event.preventDefault());
  const tasks = [...new Set(rows[state.level].map((row) => row.setting))];
  if (!tasks.includes(state.task)) state.task = tasks[0];
  const named = (names) => names.map((name) => [name, data.titles[name] || name]);
  const axes = numeric(state.level);
  if (!axes.includes(state.x)) state.x = axes[0];
  if (!axes.includes(state.y)) state.y = axes.includes(data.metric) ? data.metric : axes[1] || axes[0];
  if (tasks.length > 1) choice(form, "task", "Task", tasks.map((task) => [task, task]), state.task, (v) => { state.task = v; });
  choice(form, "x", "Across", named(axes), state.x, (v) => { state.x = v; });
  choice(form, "y", "Up", named(axes), state.y, (v) => { state.y = v; });
  choice(form, "level", "A point is", [["arms", "an arm (mean of seeds)"], ["runs", "one run"]], state.level,
    (v) => { state.level = v; controls(); });
  tick(form, "log", "logarithmic across", (v) => { state.log = v; });
  tick(form, "front", "Pareto front", (v) => { state.front = v; });
}

function filters() {
  const box = byId("filters");
  for (const key of data.filters) {
    const values = [...new Set(rows.arms.map((row) => row[key]).concat(rows.runs.map((row) => row[key])))]
      .filter((value) => value !== null && value !== undefined && value !== data.base)
      .sort((a, b) => (typeof a === "number" && typeof b === "number" ? a - b : String(a).localeCompare(String(b))));
    if (values.length < 2 || values.length > 40) continue;
    const group = make("div", { role: "group", "aria-label": data.titles[key] || key }, null, box);
    make("b", {}, data.titles[key] || key, group);
    state.hidden[key] = new Set();
    for (const value of values) {
      const label = make("label", {}, null, group);
      const input = make("input", { type: "checkbox", "data-filter": key, "data-value": value }, null, label);
      input.checked = true;
      make("span", {}, String(value), label);
      input.addEventListener("change", () => { state.hidden[key][input.checked ? "delete" : "add"](value); draw(); });
    }
  }
  box.parentElement.hidden = !box.children.length;
}

function visible(row) {
  if (row.setting !== state.task || row.arm === data.base) return false;
  if (Object.entries(state.hidden).some(([key, hidden]) => hidden.has(row[key]))) return false;
  return typeof row[state.x] === "number" && typeof row[state.y] === "number" && !(state.log && row[state.x] <= 0);
}

function ticks(low, high, log) {
  if (log && high / low >= 3) {
    const found = [];
    for (let power = Math.floor(Math.log10(low)); power <= Math.ceil(Math.log10(high)); power++)
      for (const step of high / low > 200 ? [1] : [1, 2, 5]) found.push(step * 10 ** power);
    return found.filter((value) => value >= low && value <= high);
  }
  const raw = (high - low) / 5, unit = 10 ** Math.floor(Math.log10(raw));
  const step = unit * [1, 2, 5, 10].find((factor) => factor * unit >= raw);
  const found = [];
  for (let value = Math.ceil(low / step) * step; value <= high + step * 1e-9; value += step) found.push(value);
  return found;
}

// Corners of each marker of the figures around its centre; a circle has none.
const star = Array.from({ length: 10 }, (_, i) => [(i % 2 ? 0.55 : 1.35) * Math.sin(i * Math.PI / 5), (i % 2 ? -0.55 : -1.35) * Math.cos(i * Math.PI / 5)]);
const plus = [[-0.4, -1.2], [0.4, -1.2], [0.4, -0.4], [1.2, -0.4], [1.2, 0.4], [0.4, 0.4], [0.4, 1.2], [-0.4, 1.2], [-0.4, 0.4], [-1.2, 0.4], [-1.2, -0.4], [-0.4, -0.4]];
const CORNERS = {
  s: [[-0.9, -0.9], [0.9, -0.9], [0.9, 0.9], [-0.9, 0.9]],
  "^": [[0, -1.1], [1.1, 0.9], [-1.1, 0.9]],
  v: [[0, 1.1], [1.1, -0.9], [-1.1, -0.9]],
  D: [[0, -1.2], [1.2, 0], [0, 1.2], [-1.2, 0]],
  P: plus,
  X: plus.map(([x, y]) => [0.8 * (x - y), 0.8 * (x + y)]),
  "*": star,
};

function mark(marker, x, y, size) {
  const corners = CORNERS[marker];
  if (corners) return `M${corners.map(([right, down]) => `${x + size * right},${y + size * down}`).join("L")}z`;
  return `M${x - size},${y}a${size},${size} 0 1,0 ${2 * size},0a${size},${size} 0 1,0 ${-2 * size},0z`;
}

function legend(points) {
  const box = byId("legend"), present = new Set(points.map((row) => row.kind));
  box.replaceChildren();
  if (LOOKS.size < 2) return;
  for (const [kind, look] of LOOKS) {
    if (!present.has(kind)) continue;
    const item = make("li", {}, null, box);
    make("path", { d: mark(look.marker, 8, 8, 5), fill: look.colour }, null, make("svg", { width: 16, height: 16, "aria-hidden": "true" }, null, item));
    make("span", {}, kind, item);
  }
}

function front(points) {
  const sign = data.higher.includes(state.y) ? -1 : 1;
  const found = [];
  for (const row of [...points].sort((a, b) => a[state.x] - b[state.x] || sign * (a[state.y] - b[state.y]))) {
    if (!found.length || sign * row[state.y] < sign * found[found.length - 1][state.y]) found.push(row);
  }
  return found;
}

function draw() {
  const chart = byId("chart"), narrow = chart.clientWidth < 520;
  const width = Math.max(300, chart.clientWidth || 800), height = narrow ? 340 : 430;
  const box = { left: 58, right: 14, top: 26, bottom: 44 };
  chart.setAttribute("viewBox", `0 0 ${width} ${height}`);
  chart.setAttribute("height", height);
  chart.replaceChildren();
  hideTip();
  const points = rows[state.level].filter(visible);
  const title = `${data.titles[state.y] || state.y} against ${data.titles[state.x] || state.x}`;
  make("title", { id: "chart-title" }, title, chart);
  byId("chart-note").textContent = points.length ? `${points.length} ${points.length === 1 ? state.level.slice(0, -1) : state.level} shown.` : "Nothing to show: no point has both values, or all are filtered out.";
  chart.dataset.points = points.length;
  legend(points);
  if (!points.length) return;
  const bars = state.level === "arms" && `${state.y}_low` in levels.arms;
  const xs = points.map((row) => row[state.x]);
  const ys = points.flatMap((row) => [row[state.y], ...(bars ? [row[state.y + "_low"], row[state.y + "_high"]] : [])]).filter((v) => typeof v === "number");
  let [x0, x1, y0, y1] = [Math.min(...xs), Math.max(...xs), Math.min(...ys), Math.max(...ys)];
  const log = state.log && x0 > 0;
  const padX = log ? Math.pow(x1 / x0, 0.06) || 1 : (x1 - x0) * 0.06;
  if (x0 === x1) { x0 = log ? x0 / 2 : x0 - 1; x1 = log ? x1 * 2 : x1 + 1; } else if (log) { x0 /= padX; x1 *= padX; } else { x0 -= padX; x1 += padX; }
  if (y0 === y1) { y0 -= Math.abs(y0) * 0.1 || 1; y1 += Math.abs(y1) * 0.1 || 1; } else { const pad = (y1 - y0) * 0.07; y0 -= pad; y1 += pad; }
  const scale = (v) => (log ? Math.log(v) : v);
  const px = (v) => box.left + (scale(v) - scale(x0)) / (scale(x1) - scale(x0)) * (width - box.left - box.right);
  const py = (v) => height - box.bottom - (v - y0) / (y1 - y0) * (height - box.top - box.bottom);
  let lastLabel = -100;
  for (const value of ticks(x0, x1, log)) {
    make("line", { class: "grid", x1: px(value), x2: px(value), y1: box.top, y2: height - box.bottom }, null, chart);
    if (px(value) - lastLabel > 44) { make("text", { x: px(value), y: height - box.bottom + 16, "text-anchor": "middle" }, shown(value), chart); lastLabel = px(value); }
  }
  for (const value of ticks(y0, y1, false)) {
    make("line", { class: "grid", x1: box.left, x2: width - box.right, y1: py(value), y2: py(value) }, null, chart);
    make("text", { x: box.left - 6, y: py(value) + 4, "text-anchor": "end" }, shown(Number(value.toPrecision(6))), chart);
  }
  make("text", { x: (box.left + width - box.right) / 2, y: height - 8, "text-anchor": "middle" }, data.titles[state.x] || state.x, chart);
  make("text", { x: 6, y: 14 }, data.titles[state.y] || state.y, chart);
  if (state.front && points.length > 1) {
    const line = front(points).map((row, i) => (i ? `H${px(row[state.x])}V${py(row[state.y])}` : `M${px(row[state.x])},${py(row[state.y])}`));
    make("path", { class: "front", d: line.join("") }, null, chart);
  }
  for (const row of points) {
    const [x, y] = [px(row[state.x]), py(row[state.y])], { colour, marker } = lookOf(row);
    if (bars && typeof row[state.y + "_low"] === "number")
      make("line", { x1: x, x2: x, y1: py(row[state.y + "_low"]), y2: py(row[state.y + "_high"]), stroke: colour }, null, chart);
    const point = make("path", { class: "point", d: mark(marker, x, y, state.level === "arms" ? 6 : 4), fill: colour, tabindex: state.level === "arms" ? 0 : -1, role: "img", "aria-label": describe(row), "fill-opacity": state.level === "arms" ? 0.9 : 0.55 }, null, chart);
    for (const event of ["mouseenter", "focus", "click"]) point.addEventListener(event, () => tip(row, x, y));
    for (const event of ["mouseleave", "blur"]) point.addEventListener(event, hideTip);
  }
}

function describe(row) {
  const lines = [state.level === "arms" ? row.arm : `run ${row.run_id}: ${row.arm} seed=${row.seed}`];
  for (const key of [state.y, state.x]) {
    const low = row[key + "_low"];
    const spread = typeof low === "number" ? ` [${shown(low)}, ${shown(row[key + "_high"])}]` : "";
    lines.push(`${data.titles[key] || key}: ${shown(row[key])}${spread}`);
  }
  const more = state.level === "arms" ? ["seeds", "front_probability"] : ["optim.lr", "status", "chosen"];
  for (const key of more) if (row[key] !== null && row[key] !== undefined) lines.push(`${data.titles[key] || key}: ${shown(row[key])}`);
  if (state.level === "arms" && row.run_ids) lines.push(`runs: ${row.run_ids}`);
  return lines.join("\n");
}

function tip(row, x, y) {
  const box = byId("tip"), width = byId("chart-box").clientWidth;
  box.textContent = describe(row);
  box.hidden = false;
  box.style.left = `${Math.max(0, Math.min(x + 12, width - box.offsetWidth - 4))}px`;
  box.style.top = `${Math.max(0, y - box.offsetHeight - 12)}px`;
}
function hideTip() { byId("tip").hidden = true; }

// ---- tables ----
const table = { sheet: null, by: -1, up: true, most: 100 };

function compare(a, b) {
  const empty = (v) => v === null || v === undefined || v === "";
  if (empty(a) || empty(b)) return empty(a) - empty(b);
  if (typeof a === "number" && typeof b === "number") return table.up ? a - b : b - a;
  return (table.up ? 1 : -1) * String(a).localeCompare(String(b), undefined, { numeric: true });
}

function drawTable() {
  const sheet = table.sheet, word = byId("table-search").value.toLowerCase();
  byId("table-caption").textContent = sheet.caption;
  const head = make("tr"), numbers = sheet.header.map((_, i) => sheet.rows.every((row) => row[i].v === null || typeof row[i].v === "number"));
  sheet.header.forEach((text, i) => {
    const cell = make("th", { scope: "col", class: numbers[i] ? "number" : "" }, null, head);
    cell.setAttribute("aria-sort", table.by !== i ? "none" : table.up ? "ascending" : "descending");
    make("button", { type: "button" }, text, cell).addEventListener("click", () => {
      table.up = table.by === i ? !table.up : true;
      table.by = i;
      drawTable();
      byId("table").querySelectorAll("th button")[i].focus();
    });
  });
  byId("table").tHead.replaceChildren(head);
  let found = sheet.rows.filter((row) => !word || row.some((cell) => cell.t.toLowerCase().includes(word)));
  if (table.by >= 0) found = [...found].sort((a, b) => compare(a[table.by].v, b[table.by].v));
  const body = document.createDocumentFragment();
  for (const row of found.slice(0, table.most)) {
    const line = make("tr", {}, null, body);
    row.forEach((cell, i) => {
      const long = cell.t.length > 60 ? " long" : "";
      const place = make("td", { class: numbers[i] ? "number" : cell.t.length > 28 ? "text" + long : "" }, cell.b ? null : cell.t, line);
      if (cell.b) make("strong", {}, cell.t, place);
    });
  }
  byId("table").tBodies[0].replaceChildren(body);
  const more = byId("table-more");
  more.hidden = found.length <= table.most;
  more.textContent = `Show all ${found.length} rows`;
}

function tables() {
  const select = byId("table-choice");
  data.sheets.forEach((sheet, i) => make("option", { value: i }, sheet.name.replaceAll("_", " "), select));
  const choose = () => { Object.assign(table, { sheet: data.sheets[select.value], by: -1, up: true, most: 100 }); drawTable(); };
  select.addEventListener("change", choose);
  byId("table-search").addEventListener("input", drawTable);
  byId("table-more").addEventListener("click", () => { table.most = Infinity; drawTable(); });
  for (const kind of ["latex", "markdown"]) byId("copy-" + kind).addEventListener("click", () => copy(table.sheet[kind], kind));
  if (data.sheets.length) choose();
}

async function copy(text, kind) {
  let done = true;
  try {
    await navigator.clipboard.writeText(text);
  } catch {
    // A file opened from disk may not reach the clipboard: select the text instead.
    const area = make("textarea", { readonly: "", style: "position:fixed;opacity:0" }, text, document.body);
    area.select();
    done = document.execCommand("copy");
    area.remove();
  }
  byId("copied").textContent = done ? `${kind === "latex" ? "LaTeX" : "Markdown"} of this table is on the clipboard.` : "The browser did not allow copying; the file is in tables/.";
}

// ---- page ----
byId("title").textContent = data.title;
byId("counts").textContent = data.counts;
list(byId("answer-list"), data.answers);
list(byId("notes"), data.notes);
for (const check of data.checks) {
  const item = make("li", {}, null, byId("check-list"));
  make("span", { class: "warn" }, check.check, item);
  item.append(` — ${check.subject}: ${check.message}`);
}
if (!data.checks.length) list(byId("check-list"), ["Nothing was found."]);
for (const figure of data.figures) {
  const box = make("figure", {}, null, byId("gallery"));
  make("img", { src: figure.src, alt: figure.alt, loading: "lazy" }, null, box);
  make("figcaption", {}, figure.alt, box);
}
list(byId("absent"), data.absent);
if (rows.arms.length) { controls(); filters(); draw(); } else { byId("explore").hidden = document.querySelector('nav [href="#explore"]').hidden = true; }
tables();
let resizing = 0;
addEventListener("resize", () => { clearTimeout(resizing); resizing = setTimeout(draw, 120); });
addEventListener("keydown", (event) => { if (event.key === "Escape") hideTip(); });
