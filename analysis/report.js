"use strict";
// Every text from the data enters the page through textContent or setAttribute, or as a value of a chart's data row:
// never as markup, never as part of an expression.
const data = JSON.parse(document.getElementById("data").textContent);
const byId = (id) => document.getElementById(id);
const SVG = "http://www.w3.org/2000/svg";

function make(tag, attributes = {}, text = null, parent = null) {
  const svg = ["svg", "path", "rect", "text", "g"].includes(tag);
  const element = svg ? document.createElementNS(SVG, tag) : document.createElement(tag);
  for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
  if (text !== null) element.textContent = text;
  if (parent) parent.append(element);
  return element;
}

function list(parent, items) {
  parent.replaceChildren();
  for (const item of items) make("li", {}, item, parent);
}

function options(select, pairs, value) {
  select.replaceChildren();
  for (const [key, text] of pairs) make("option", { value: key }, text, select);
  select.value = value;
}

function shown(value) {
  if (value === null || value === undefined || value === "") return "–";
  if (typeof value !== "number") return String(value);
  const size = Math.abs(value);
  if (size >= 1e12 || (size > 0 && size < 1e-3)) return value.toExponential(2);
  for (const [unit, scale] of [["G", 1e9], ["M", 1e6], ["k", 1e4]]) {
    if (size >= scale) return `${Number((value / (unit === "k" ? 1e3 : scale)).toPrecision(3))}${unit}`;
  }
  return String(Number(value.toPrecision(4)));
}

const titled = (name) => data.titles[name] || name;
const isNumber = (value) => typeof value === "number";

// ---- state: what is chosen; it stands in the address, so that a link shows the same ----
const DEFAULTS = { task: data.settings[0] || "", x: "trainable_parameters", y: data.metric, level: "arms", log: "1", front: "1",
  brushing: "", words: "", arm: "", first: "", second: "", by: "", shade: "rank", theme: "auto", table: "", sort: "" };
const state = { ...DEFAULTS };
let picked = [], rows = {};

function readAddress() {
  Object.assign(state, DEFAULTS);
  for (const [key, value] of new URLSearchParams(location.hash.slice(1))) if (key in DEFAULTS) state[key] = value;
  if (!data.settings.includes(state.task)) state.task = DEFAULTS.task;
}

function writeAddress() {
  const changed = Object.entries(state).filter(([key, value]) => value !== DEFAULTS[key]);
  history.replaceState(null, "", changed.length ? `#${new URLSearchParams(changed)}` : location.pathname + location.search);
}

function set(changes, ...draws) {
  Object.assign(state, changes);
  writeAddress();
  for (const draw of draws) draw();
}

// ---- rows ----
function rowsOf(columns = {}) {
  const names = Object.keys(columns);
  const count = names.length ? columns[names[0]].length : 0;
  return Array.from({ length: count }, (_, i) => Object.fromEntries(names.map((name) => [name, columns[name][i]])));
}

function readRows() {
  rows = Object.fromEntries(Object.entries(data.tables).map(([name, columns]) => [name, rowsOf(columns)]));
  rows.arms.forEach((row, id) => { row.id = id; });
}

const inTask = (arm) => arm && arm.setting === state.task && (!state.words || arm.arm.toLowerCase().includes(state.words.toLowerCase()));
const visible = () => rows.arms.filter(inTask);
const ofArms = (name) => (rows[name] || []).filter((row) => inTask(rows.arms[row.id])).map((row) => ({ ...row, kind: rows.arms[row.id].kind, label: rows.arms[row.id].arm }));
const chosen = () => rows.arms.findIndex((row) => row.setting === state.task && row.arm === state.arm);
const numeric = (names) => names.filter((name) => (rows[state.level] || []).some((row) => isNumber(row[name])));

function spread(row, name) {
  const [low, high] = [row[`${name}_low`], row[`${name}_high`]];
  return isNumber(low) && isNumber(high) ? ` [${shown(low)}, ${shown(high)}]` : "";
}

function describe(row) {
  const arm = rows.arms[row.id];
  if (!arm) return row.label || "";
  const lines = [arm.arm + (arm.dagger ? " †" : "")];
  if (row.run_id) lines.push(`run ${row.run_id}, seed ${shown(row.seed)}${row.chosen ? ", of the chosen trial" : ""}`);
  if (row.about) return [...lines, row.about].join("\n");
  for (const name of new Set([state.y, state.x, data.metric])) {
    const value = row.run_id ? row[name] : arm[name];
    if (isNumber(value)) lines.push(`${titled(name)}: ${shown(value)}${row.run_id ? "" : spread(arm, name)}`);
  }
  if (isNumber(arm["optim.lr"])) lines.push(`learning rate: ${shown(arm["optim.lr"])}`);
  lines.push(`${arm.seeds} ${arm.seeds === 1 ? "seed" : "seeds"}${isNumber(arm.front_probability) ? `; on the front with probability ${shown(arm.front_probability)}` : ""}`);
  return lines.join("\n");
}

// ---- charts: of each its rows, its titles and what of its specification depends on the state ----
const scored = () => `${data.split} ${titled(data.metric)}`;
const MANY = 2000; // marks above which a canvas is faster than SVG, and means say more than runs
const fewer = (found) => (found.length <= MANY ? found : [...new Map(found.map((row) => [`${row.id} ${row.lr}`, { ...row, value: row.mean }])).values()]);
const CHARTS = {
  pareto: {
    title: () => `${titled(state.y)} against ${titled(state.x)}`,
    axes: () => ({ x: titled(state.x), y: titled(state.y) }),
    change: (spec) => {
      if (state.log) { spec.encoding.x.scale = { type: "log" }; spec.encoding.x.axis = { format: "~s", labelOverlap: true }; }
      if (state.level === "runs") spec.layer = spec.layer.filter((layer) => layer.mark.type !== "text").map((layer) => ({ ...layer, ...(layer.params ? { mark: { ...layer.mark, size: 22 } } : {}) }));
    },
    rows: () => {
      const found = state.level === "arms" ? visible() : ofArms("runs");
      const placed = found.filter((row) => isNumber(row[state.x]) && isNumber(row[state.y]) && !(state.log && row[state.x] <= 0));
      const best = front(placed), named = state.level === "arms" ? labelled(placed, best) : new Set();
      return placed.map((row) => ({
        id: row.id, kind: row.kind, label: row.arm || row.label, x: row[state.x], y: row[state.y], front: best.has(row), run_id: row.run_id, seed: row.seed, chosen: row.chosen,
        low: row[`${state.y}_low`] ?? null, high: row[`${state.y}_high`] ?? null, text: named.has(row) ? rows.arms[row.id].label : null,
      }));
    },
  },
  rank: {
    title: () => "Rank", axes: () => ({ x: "rank", y: scored() }),
    rows: () => {
      const found = visible().filter((row) => row.simplest && isNumber(row.rank) && isNumber(row[data.metric]));
      return new Set(found.map((row) => row.rank)).size < 2 ? [] : found.map((row) => ({ id: row.id, kind: row.kind, line: row.kind, label: row.arm, x: row.rank, y: row[data.metric], low: row[`${data.metric}_low`] ?? null, high: row[`${data.metric}_high`] ?? null }));
    },
  },
  rates: {
    title: () => "Learning rate (chosen ones ringed)", axes: () => ({ x: "learning rate", y: `validation ${titled(data.metric)}` }),
    rows: () => fewer(ofArms("rates")).map((row) => ({ ...row, x: row.lr, y: row.value, about: `seed ${shown(row.seed)}, learning rate ${shown(row.lr)}: ${shown(row.value)}` })),
  },
  training: { title: () => "Training loss (mean of seeds; range of the arm under the pointer)", axes: () => ({ x: "step", y: "training loss" }), rows: () => overSteps("training") },
  validation: { title: () => "Validation while training", axes: () => ({ x: "step", y: "validation NLL" }), rows: () => overSteps("validation") },
  forest: {
    title: () => "Paired differences at equal rank, 95% intervals (blue: significant)", axes: () => ({ x: `difference in ${scored()}`, y: null }),
    rows: () => {
      const arm = chosen(), near = (row) => row.a === arm || row.b === arm || picked.includes(row.a) || picked.includes(row.b);
      const found = (rows.forest || []).filter((row) => row.setting === state.task && (inTask(rows.arms[row.a]) || inTask(rows.arms[row.b])));
      return [...found.filter(near), ...found.filter((row) => !near(row))].slice(0, 40).map((row) => ({ ...row, id: row.b, other: row.a, x: row.difference, y: row.label,
        about: `${row.label}: ${shown(row.difference)} [${shown(row.low)}, ${shown(row.high)}], adjusted p ${shown(row.p_holm)}` }));
    },
    change: (spec) => { spec.encoding.y = { ...spec.encoding.y, field: "label" }; },
  },
  parallel: {
    title: () => "Parallel coordinates (drag along an axis to select)", axes: () => ({}),
    rows: () => {
      const arms = visible(), found = [];
      for (const name of data.axes) {
        const known = arms.filter((row) => isNumber(row[name]));
        const values = known.map((row) => row[name]), low = Math.min(...values), high = Math.max(...values);
        if (!(high > low)) continue;
        const scale = (value) => (low > 0 && high / low > 20 ? Math.log(value / low) / Math.log(high / low) : (value - low) / (high - low));
        for (const row of known) found.push({ id: row.id, kind: row.kind, line: row.id, x: titled(name), y: scale(row[name]), about: `${titled(name)}: ${shown(row[name])}`, end: null });
        for (const [value, y] of [[low, 0], [high, 1]]) found.push({ id: -1, x: titled(name), y, end: shown(value) });
      }
      return new Set(found.map((row) => row.x)).size < 2 ? [] : found;
    },
    change: (spec) => { for (const layer of spec.layer.slice(0, 2)) layer.transform = [{ filter: "datum.id >= 0" }]; },
  },
  layers: {
    title: () => { const arm = rows.arms[shownArm()]; return arm ? `Rank by module and layer: ${arm.arm}` : ""; }, axes: () => ({ value: "rank" }),
    rows: () => {
      const layout = data.layouts.layouts[data.layouts.of[shownArm()]] || {};
      return Object.entries(layout).flatMap(([role, own]) => own.layers.map((layer, i) => ({ id: shownArm(), x: layer, y: role, value: own.ranks[i], about: `${role}, layer ${shown(layer)}: rank ${shown(own.ranks[i])}` }))).filter((row) => row.x !== null);
    },
  },
};

// Rows that no cheaper one equals.
function front(found) {
  const sign = data.higher.includes(state.y) ? -1 : 1, kept = new Set();
  let best = Infinity;
  for (const row of [...found].sort((a, b) => a[state.x] - b[state.x] || sign * (a[state.y] - b[state.y]))) {
    if (sign * row[state.y] < best) { kept.add(row); best = sign * row[state.y]; }
  }
  return kept;
}

// Rows whose labels do not lie over one another, those of the front first.
function labelled(found, best) {
  const place = (row, name, log) => (log ? Math.log(row[name]) : row[name]), kept = [];
  const scale = (name, log) => {
    const values = found.map((row) => place(row, name, log)), low = Math.min(...values), high = Math.max(...values);
    return (row) => (high > low ? (place(row, name, log) - low) / (high - low) : 0);
  };
  const x = scale(state.x, state.log), y = scale(state.y, false);
  const wide = Math.min(0.3, (7 * Math.max(0, ...found.map((row) => row.label.length))) / Math.max(300, byId("chart-pareto").parentElement.clientWidth));
  for (const row of [...found].filter((one) => best.has(one) || found.length <= 30).sort((a, b) => best.has(b) - best.has(a))) {
    if (kept.every((other) => Math.abs(x(row) - x(other)) > wide || Math.abs(y(row) - y(other)) > 0.045)) kept.push(row);
  }
  return new Set(kept);
}

function overSteps(name) {
  return ofArms(name).map((row) => ({ ...row, line: row.id, x: row.step, y: row.mean, about: `step ${row.step}: ${shown(row.mean)}` }));
}

const views = {};

function ready(name, found) {
  const chart = CHARTS[name], style = getComputedStyle(document.documentElement);
  const spec = structuredClone(data.specs[name]);
  if (chart.change) chart.change(spec, found);
  const drags = Object.fromEntries(spec.layer.flatMap((layer) => layer.params || []).map((param) => [param.name, param.select]));
  if (state.brushing && drags.view) for (const key of ["on", "translate"]) [drags.brush[key], drags.view[key]] = [drags.view[key], drags.brush[key]];
  const ys = found.map((row) => row.y).filter(isNumber);
  if (["training", "validation", "rates"].includes(name) && Math.min(...ys) > 0 && Math.max(...ys) / Math.min(...ys) > 8) for (const layer of [spec, ...spec.layer]) if (layer.encoding && layer.encoding.y && layer.encoding.y.scale) layer.encoding.y.scale = { type: "log" };
  const axes = chart.axes(), colours = { ink: 1, quiet: 1, link: 1, paper: 1 };
  const fill = (node) => {
    if (Array.isArray(node)) return node.map(fill);
    if (node && typeof node === "object") return Object.fromEntries(Object.entries(node).map(([key, value]) => [key, fill(value)]));
    if (node === "#000000" || node === "#3b3b3b") return style.getPropertyValue("--ink").trim(); // black is the page's ink
    if (typeof node !== "string" || node[0] !== "@") return node;
    return node.slice(1) in colours ? style.getPropertyValue(`--${node.slice(1)}`).trim() : axes[node.slice(1)] ?? null;
  };
  const [ink, quiet, line] = ["ink", "quiet", "line"].map((key) => style.getPropertyValue(`--${key}`).trim());
  const text = { labelColor: ink, titleColor: ink };
  return { ...fill(spec), config: { background: "transparent", font: "system-ui, sans-serif", view: { stroke: null }, legend: text,
    axis: { ...text, gridColor: line, domainColor: quiet, tickColor: quiet, titleFontWeight: 500 } } };
}

async function draw(name) {
  const box = byId(`chart-${name}`), found = CHARTS[name].rows();
  box.hidden = !found.length;
  if (views[name]) { views[name].finalize(); delete views[name]; }
  box.replaceChildren();
  if (!found.length) return;
  const head = make("div", { class: "head" }, null, box), title = make("h3", {}, CHARTS[name].title(), head);
  const large = make("button", { type: "button", "aria-label": `Enlarge ${title.textContent}` }, box.classList.contains("large") ? "smaller" : "larger", head);
  large.addEventListener("click", () => { box.classList.toggle("large"); draw(name); });
  const save = make("button", { type: "button", "aria-label": `Save ${title.textContent} as SVG` }, "SVG", head);
  const place = make("div", { class: "chart", tabindex: 0, role: "group", "aria-label": `${title.textContent}: ${found.length} rows. Arrows step through arms, Enter opens one.` }, null, box);
  const spec = ready(name, found);
  if (isNumber(spec.height)) spec.height = box.classList.contains("large") ? 560 : name === "pareto" ? 420 : spec.height;
  else spec.height = spec.height.step * new Set(found.map((row) => row.y)).size;
  spec.datasets = { rows: found };
  const turn = (draws[name] = (draws[name] || 0) + 1);
  const embedded = await vegaEmbed(place, spec, { ast: true, actions: false, renderer: found.length > MANY ? "canvas" : "svg", tooltip: tip, logLevel: 1 });
  if (turn !== draws[name]) return void embedded.finalize(); // drawn again meanwhile
  const view = (views[name] = embedded.view);
  for (const mark of place.querySelectorAll('[class*="brush_brush"]')) mark.setAttribute("aria-hidden", "true"); // Vega gives it no name
  tell(view);
  place.dataset.rows = found.length; // it is drawn
  performance.mark(name);
  save.addEventListener("click", async () => {
    const link = make("a", { href: await view.toImageURL("svg"), download: `${name}.svg` });
    link.click();
  });
  view.addEventListener("click", (_, item) => { if (item && item.datum && item.datum.id >= 0 && !brushed(view)) open(item.datum.id); });
  view.addEventListener("pointerover", (_, item) => light(item && item.datum && item.datum.id >= 0 ? item.datum.id : -1));
  view.addEventListener("pointerout", () => light(-1));
  if (spec.layer.some((layer) => (layer.params || []).some((param) => param.name === "brush"))) view.addSignalListener("brush", (_, value) => brush(name, value));
  place.addEventListener("keydown", (event) => step(event, [...new Set(found.filter((row) => row.id >= 0).sort((a, b) => a.x - b.x).map((row) => row.id))]));
}
const draws = {};
const brushed = (view) => { try { return Object.keys(view.signal("brush") || {}).length > 0; } catch { return false; } };

function tip(_, event, item, value) {
  const box = byId("tip") || make("div", { id: "tip" }, null, document.body);
  box.hidden = !(value && value.id !== undefined && value.id >= 0);
  if (box.hidden) return;
  box.textContent = describe(value);
  box.style.left = `${Math.max(4, Math.min(event.clientX + 14, innerWidth - box.offsetWidth - 8))}px`;
  box.style.top = `${Math.max(4, Math.min(event.clientY + 14, innerHeight - box.offsetHeight - 8))}px`;
}

// The arm under the pointer, and arms that were brushed, are the same in all charts.
let lit = -1;
function tell(view) {
  for (const [name, value] of [["lit", lit], ["kind", lit < 0 ? "" : rows.arms[lit].kind], ["picked", picked], ["front", Boolean(state.front)]]) view.signal(name, value);
  view.runAsync();
}

let waiting = false;
function tellAll() {
  if (waiting) return;
  waiting = true;
  requestAnimationFrame(() => { waiting = false; Object.values(views).forEach(tell); });
}

function light(id) {
  const next = id < 0 ? chosen() : id;
  if (next !== lit) { lit = next; tellAll(); }
}

let settling = 0;
function brush(name, value) {
  const fields = Object.entries(value || {});
  const inside = (row) => fields.every(([field, range]) => (isNumber(range[0]) ? row[field] >= Math.min(...range) && row[field] <= Math.max(...range) : range.includes(row[field])));
  picked = fields.length ? [...new Set(views[name].data("rows").filter((row) => row.id >= 0 && inside(row)).map((row) => row.id))] : [];
  tellAll();
  clearTimeout(settling);
  settling = setTimeout(() => { byId("said").textContent = picked.length ? `${picked.length} arms selected` : ""; drawLegend(); if (name !== "forest") draw("forest"); }, 250);
}

function step(event, ids) {
  const forward = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 }[event.key];
  if (forward && ids.length) {
    event.preventDefault();
    const next = ids[(ids.indexOf(lit) + forward + ids.length) % ids.length] ?? ids[0];
    lit = next;
    tellAll();
    byId("said").textContent = describe({ id: next }).replaceAll("\n", "; ");
  } else if (event.key === "Enter" && event.target === event.currentTarget && lit >= 0) open(lit);
}

// The first chart can be used while the others are drawn.
let round = 0;
async function drawAll() {
  const mine = ++round;
  drawLegend(); drawCards(); drawArm();
  await draw("pareto");
  drawBlocks(); drawExamples(true);
  for (const name of Object.keys(CHARTS).slice(1)) {
    await new Promise((later) => setTimeout(later));
    if (mine !== round) return; // begun again meanwhile
    await draw(name);
  }
  performance.mark("drawn");
}

// ---- kinds ----
function drawLegend() {
  const box = byId("legend"), present = new Set(visible().map((row) => row.kind));
  box.replaceChildren();
  if (present.size < 2) return;
  for (const look of data.looks.filter((one) => present.has(one.kind))) {
    const ids = visible().filter((row) => row.kind === look.kind).map((row) => row.id);
    const button = make("button", { type: "button", "aria-pressed": picked.length > 0 && ids.every((id) => picked.includes(id)) }, null, box);
    const mark = make("svg", { width: 14, height: 14, viewBox: "-1.3 -1.3 2.6 2.6", "aria-hidden": "true" }, null, button);
    make("path", { d: outline(look.shape), fill: ["#000000", "#3b3b3b"].includes(look.colour) ? "currentColor" : look.colour }, null, mark);
    make("span", {}, look.kind, button);
    button.addEventListener("click", () => {
      picked = button.getAttribute("aria-pressed") === "true" ? picked.filter((id) => !ids.includes(id)) : [...new Set([...picked, ...ids])];
      drawLegend(); tellAll(); draw("forest");
      byId("said").textContent = picked.length ? `${picked.length} arms selected` : "All arms";
    });
  }
}

function outline(shape) {
  const plain = { circle: "M-1,0a1,1 0 1,0 2,0a1,1 0 1,0 -2,0z", square: "M-.9,-.9h1.8v1.8h-1.8z", "triangle-up": "M0,-1L1,.9L-1,.9z", "triangle-down": "M0,1L1,-.9L-1,-.9z", diamond: "M0,-1.2L1,0L0,1.2L-1,0z",
    cross: "M-.4,-1.1h.8v.7h.7v.8h-.7v.7h-.8v-.7h-.7v-.8h.7z" };
  return plain[shape] || shape;
}

// ---- verdicts ----
function drawCards() {
  const box = byId("cards");
  box.replaceChildren();
  for (const card of data.verdicts.filter((one) => one.setting === state.task)) {
    const place = make("div", { class: card.supported ? "card found" : "card" }, null, box);
    make("p", {}, card.heading, place);
    make("p", { class: "value" }, card.value, place);
    make("p", { class: "text", title: card.text }, card.text, place);
    if (card.arm !== null) make("button", { type: "button" }, `Show ${card.arm}`, place).addEventListener("click", () => open(rows.arms.findIndex((row) => row.setting === card.setting && row.arm === card.arm)));
  }
}

// ---- the block: where the modules of a placement are ----
// Boxes from above, as data flows from below: row, left and width in a block of 12 columns.
const PLACES = { ff_down: [0, 0, 12], ff_gate: [1, 0, 6], ff_up: [1, 6, 6], ff_gate_up: [1, 0, 12], attn_o: [2, 0, 12], attn_q: [3, 0, 4], attn_k: [3, 4, 4], attn_v: [3, 8, 4], attn_qk: [3, 0, 8], attn_qkv: [3, 0, 12] };
const PLAIN = ["ff_down", "ff_gate", "ff_up", "attn_o", "attn_q", "attn_k", "attn_v"];
const layoutOf = (id) => data.layouts.layouts[data.layouts.of[id]];
const shownArm = () => { const id = chosen(); return id >= 0 && layoutOf(id) ? id : kindsWithModules().map((one) => one.best)[0] ?? -1; };

function kindsWithModules() {
  const sign = data.higher.includes(data.metric) ? -1 : 1, found = new Map();
  for (const row of visible().filter((one) => layoutOf(one.id)).sort((a, b) => sign * (a[data.metric] - b[data.metric]))) if (!found.has(row.kind)) found.set(row.kind, { kind: row.kind, best: row.id });
  return [...found.values()];
}

function shadeOf(share) {
  const dark = document.documentElement.dataset.theme === "dark";
  return `hsl(205 ${Math.round(35 + 40 * share)}% ${Math.round(dark ? 20 + 22 * share : 92 - 34 * share)}%)`;
}

function drawBlocks() {
  const kinds = kindsWithModules(), box = byId("blocks"), arm = chosen();
  byId("block").hidden = !kinds.length;
  box.replaceChildren();
  if (!kinds.length) return;
  const all = new Set(visible().flatMap((row) => Object.keys(layoutOf(row.id) || {})));
  const roles = [...all].every((role) => PLAIN.includes(role)) ? PLAIN : [...all];
  const others = roles.filter((role) => !(role in PLACES));
  const most = Math.max(...kinds.flatMap(({ best }) => Object.values(layoutOf(best)).flatMap((own) => own.ranks)));
  const scores = kinds.map(({ best }) => rows.arms[best][data.metric]), base = (data.base[state.task] || {})[data.metric];
  const gain = (value) => Math.abs(value - (base ?? Math.max(...scores))), largest = Math.max(...scores.map(gain)) || 1;
  const byModule = state.shade === "effect" && kinds.some(({ best }) => data.layouts.energy[best]);
  byId("shade-note").textContent = state.shade === "rank" ? "Lit modules have adapters; numbers are ranks of the kind's best arm (or of the chosen one)."
    : byModule ? "Effect: share of the update's squared norm by module." : `Effect: how much ${titled(data.metric)} moves from the base model, of the arm that moves it most.`;
  for (const { kind, best } of kinds) {
    const own = arm >= 0 && rows.arms[arm].kind === kind && layoutOf(arm) ? arm : best, row = rows.arms[own], layout = layoutOf(own);
    const button = make("button", { type: "button", "aria-pressed": arm === own }, null, box);
    make("b", {}, kind, button);
    const drawn = make("svg", { viewBox: `0 0 150 ${150 + 22 * Math.ceil(others.length / 2)}`, role: "img", "aria-label": `adapted: ${Object.keys(layout).join(", ")}` }, null, button);
    const top = 22 * Math.ceil(others.length / 2);
    for (const [y, tall] of [[top + 4, 60], [top + 80, 60]]) make("rect", { x: 1, y, width: 148, height: tall, rx: 6, fill: "none", stroke: "var(--line)" }, null, drawn);
    make("path", { d: `M75,${top + 150}V${top + 140}M75,${top + 80}V${top + 64}M75,${top + 4}V${top}`, stroke: "var(--quiet)" }, null, drawn);
    for (const role of roles) {
      const at = others.indexOf(role), [line, left, wide] = at >= 0 ? [-1, 6 * (at % 2), 6] : PLACES[role];
      const y = at >= 0 ? 22 * Math.floor(at / 2) + 2 : top + [9, 36, 85, 112][line], x = 6 + 11.5 * left;
      const adapted = layout[role], rank = adapted ? Math.max(...adapted.ranks) : 0;
      const share = state.shade === "rank" ? rank / most : byModule ? (data.layouts.energy[own] || {})[role] || 0 : gain(row[data.metric]) / largest;
      make("rect", { x, y, width: 11.5 * wide - 2, height: 22, rx: 4, fill: adapted ? shadeOf(share) : "none", stroke: adapted ? "var(--link)" : "var(--line)", "data-role": role, "data-lit": Boolean(adapted) }, null, drawn);
      const name = role.replace(/^(attn|ff)_/, "").slice(0, Math.floor(1.9 * wide)), note = !adapted ? "" : state.shade === "rank" ? ` ${shown(rank)}` : byModule ? ` ${Math.round(100 * share)}%` : "";
      make("text", { x: x + 5.75 * wide - 1, y: y + 15, "text-anchor": "middle", opacity: adapted ? 1 : 0.55 }, wide < 6 && note ? `${name[0]}${note}` : name + note, drawn);
    }
    const layers = [...new Set(Object.values(layout).flatMap((one) => one.layers))].filter(isNumber).sort((a, b) => a - b);
    make("span", { class: "quiet" }, `${layers.length} layers${layers.length && layers.at(-1) - layers[0] + 1 === layers.length ? ` (${layers[0]}–${layers.at(-1)})` : ""}; ${row.label}: ${titled(data.metric)} ${shown(row[data.metric])}`, button);
    button.addEventListener("click", () => open(own));
    for (const [event, id] of [["pointerenter", own], ["pointerleave", -1], ["focus", own], ["blur", -1]]) button.addEventListener(event, () => light(id));
  }
}

// ---- an arm's card ----
function open(id) {
  const row = rows.arms[id];
  if (!row) return;
  set({ task: row.setting, arm: row.arm, first: row.arm }, drawArm, drawBlocks, () => draw("layers"), () => draw("forest"), () => drawExamples(true));
  lit = id;
  tellAll();
  byId("arm").focus();
}

function close() {
  set({ arm: "" }, drawArm, drawBlocks, () => draw("layers"), () => draw("forest"));
  light(-1);
}

function drawArm() {
  const box = byId("arm"), id = chosen(), row = rows.arms[id], card = data.cards[id];
  box.replaceChildren();
  if (box.hidden !== id < 0) { box.hidden = id < 0; dispatchEvent(new Event("resize")); } // charts follow the window's
  if (id < 0) return;
  make("h3", {}, row.arm, box);
  make("button", { type: "button" }, "Close", box).addEventListener("click", close);
  const terms = (pairs) => { const place = make("dl", {}, null, box); for (const [term, text] of pairs) { make("dt", {}, term, place); make("dd", {}, text, place); } };
  const base = data.base[row.setting] || {};
  terms(data.metrics.filter((name) => isNumber(row[name])).map((name) => [titled(name), `${shown(row[name])}${spread(row, name)}${isNumber(base[name]) ? `; base model ${shown(base[name])}` : ""}`]));
  if (row.dagger) make("p", { class: "warn" }, `† ${card.doubts.join("; ")}`, box);
  terms(card.config);
  terms(["trainable_parameters", "trainable_percent", "train_seconds_solo", "peak_memory_solo_bytes", "tokens_per_second_solo", "train_flops", "adapter_bytes", "forgetting"].filter((name) => isNumber(row[name])).map((name) => [titled(name), shown(row[name])]));
  if (card.command) {
    make("b", {}, "Train it again", box);
    make("pre", { id: "command" }, card.command, box);
    make("button", { type: "button" }, "Copy command", box).addEventListener("click", () => copy(card.command, "The command"));
  }
  make("p", { class: "quiet" }, `${card.count} ${card.count === 1 ? "run" : "runs"}: ${card.runs.join(", ")}${card.count > card.runs.length ? ", …" : ""}`, box);
  const set_ = data.predictions.find((one) => one.setting === row.setting);
  if (set_ && set_.arms[row.arm]) make("a", { href: "#predictions" }, "What it predicts", box);
}

// ---- predictions ----
let mostExamples = 20;
function drawExamples(fresh = false) {
  const found = data.predictions.find((one) => one.setting === state.task);
  byId("predictions").hidden = !found;
  if (!found) return;
  const names = Object.keys(found.arms), reference = visible().find((row) => row.is_reference && row.arm !== state.first);
  const first = names.includes(state.first) ? state.first : names[0];
  const second = state.second === "*" || names.includes(state.second) ? state.second : (reference && names.includes(reference.arm) ? reference.arm : "*");
  const by = found.metrics.includes(state.by) ? state.by : found.metrics[0];
  if (fresh) {
    mostExamples = 20;
    options(byId("first"), names.map((name) => [name, name]), first);
    options(byId("second"), [["*", "the base model"], ...names.map((name) => [name, name])], second);
    options(byId("by"), found.metrics.map((name) => [name, titled(name)]), by);
  }
  const a = found.arms[first], b = second === "*" ? found.before : found.arms[second], word = byId("example-words").value.toLowerCase();
  const gap = (i) => Math.abs((a[by] || [])[i] - (b[by] || [])[i]) || 0;
  const texts = (i) => [found.ids[i], found.prompts[i], found.references[i], (found.before.text || [])[i], (a.text || [])[i], (b.text || [])[i]].map((one) => (one === null || one === undefined ? "" : String(one)));
  const order = found.ids.map((_, i) => i).filter((i) => !word || texts(i).some((one) => one.toLowerCase().includes(word))).sort((i, j) => gap(j) - gap(i));
  const any = (column) => found.ids.some((_, i) => texts(i)[column]);
  const columns = [["example", 0], ["prompt", 1], ["reference", 2], ["base model wrote", 3], [`${first} wrote`, 4], ...(second === "*" ? [] : [[`${second} wrote`, 5]])].filter(([, column]) => any(column));
  const scores = found.metrics.flatMap((name) => [[`${titled(name)}, ${first}`, a[name]], [`${titled(name)}, ${second === "*" ? "base model" : second}`, b[name]]]).filter(([, values]) => values);
  const head = make("tr");
  for (const [text] of columns) make("th", { scope: "col" }, text, head);
  for (const [text] of scores) make("th", { scope: "col", class: "number" }, text, head);
  byId("examples").tHead.replaceChildren(head);
  const body = document.createDocumentFragment();
  for (const i of order.slice(0, mostExamples)) {
    const line = make("tr", {}, null, body);
    for (const [, column] of columns) {
      const text = texts(i)[column], cell = make("td", { class: "text" }, text.length > 160 ? null : text || "–", line);
      if (text.length > 160) { const fold = make("details", {}, null, cell); make("summary", {}, `${text.slice(0, 120)}…`, fold); make("div", {}, text, fold); }
    }
    for (const [, values] of scores) make("td", { class: "number" }, shown(values[i]), line);
  }
  byId("examples").tBodies[0].replaceChildren(body);
  byId("examples-note").textContent = `The ${found.ids.length} of ${found.among} ${data.split} examples on which the arms differ most, those first on which these two differ. Scores are means over seeds.` + (any(1) || any(4) ? "" : " The study keeps no texts of them (sweep.keep_texts, evaluation.generate).");
  byId("examples-more").hidden = order.length <= mostExamples;
  byId("examples-more").textContent = `Show all ${order.length}`;
}

// ---- tables ----
const table = { sheet: null, by: -1, up: true, most: 100 };

function compare(a, b) {
  const empty = (v) => v === null || v === undefined || v === "";
  if (empty(a) || empty(b)) return empty(a) - empty(b);
  if (isNumber(a) && isNumber(b)) return table.up ? a - b : b - a;
  return (table.up ? 1 : -1) * String(a).localeCompare(String(b), undefined, { numeric: true });
}

function drawTable() {
  const sheet = table.sheet, word = byId("table-search").value.toLowerCase();
  byId("table-caption").textContent = sheet.caption;
  const head = make("tr"), numbers = sheet.header.map((_, i) => sheet.rows.every((row) => row[i].v === null || isNumber(row[i].v)));
  sheet.header.forEach((text, i) => {
    const cell = make("th", { scope: "col", class: numbers[i] ? "number" : "" }, null, head);
    cell.setAttribute("aria-sort", table.by !== i ? "none" : table.up ? "ascending" : "descending");
    make("button", { type: "button" }, text, cell).addEventListener("click", () => {
      table.up = table.by === i ? !table.up : true;
      table.by = i;
      set({ sort: `${i}${table.up ? "" : "-"}` }, drawTable);
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

function chooseTable() {
  const sheet = data.sheets.find((one) => one.name === state.table) || data.sheets[0];
  if (!sheet) return;
  byId("table-choice").value = sheet.name;
  Object.assign(table, { sheet, by: state.sort ? parseInt(state.sort, 10) : -1, up: !state.sort.endsWith("-"), most: 100 });
  if (!(table.by < sheet.header.length)) table.by = -1;
  drawTable();
}

async function copy(text, what) {
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
  byId("copied").textContent = byId("said").textContent = done ? `${what} is on the clipboard.` : "The browser did not allow copying; tables are files in tables/ too.";
}

// ---- page ----
const dark = matchMedia("(prefers-color-scheme: dark)");
function paint() {
  const next = state.theme === "auto" ? (dark.matches ? "dark" : "light") : state.theme, former = document.documentElement.dataset.theme;
  document.documentElement.dataset.theme = next;
  if (former && former !== next) { for (const name of Object.keys(views)) draw(name); drawBlocks(); }
}

function controls() {
  const axes = numeric(Object.keys(data.tables[state.level] || {}).filter((name) => !/_(low|high)$/.test(name) && !["on_front", "id", "seed"].includes(name)));
  if (axes.length) {
    if (!axes.includes(state.x)) state.x = axes[0];
    if (!axes.includes(state.y)) state.y = axes.includes(data.metric) ? data.metric : axes[1] || axes[0];
  }
  for (const key of ["x", "y"]) options(byId(key), axes.map((name) => [name, titled(name)]), state[key]);
  for (const key of ["task", "level", "theme", "shade", "words"]) byId(key).value = state[key];
  for (const key of ["log", "front", "brushing"]) byId(key).checked = Boolean(state[key]);
}

function begin() {
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
    const button = make("button", { type: "button", "aria-label": `Enlarge: ${figure.alt}` }, null, box);
    make("img", { src: figure.src, alt: figure.alt, loading: "lazy" }, null, button);
    make("figcaption", {}, figure.alt, box);
    button.addEventListener("click", () => { byId("large").replaceChildren(make("img", { src: figure.src, alt: figure.alt })); byId("large").showModal(); });
  }
  byId("large").addEventListener("click", () => byId("large").close());
  list(byId("absent"), data.absent);
  options(byId("task"), data.settings.map((name) => [name, name]), state.task);
  byId("task-label").hidden = data.settings.length < 2;
  options(byId("table-choice"), data.sheets.map((sheet) => [sheet.name, sheet.name.replaceAll("_", " ")]), state.table);
  byId("controls").addEventListener("submit", (event) => event.preventDefault());
  const pareto = () => { controls(); draw("pareto"); };
  const on = (id, event, change, ...then) => byId(id).addEventListener(event, () => set({ [id]: change(byId(id)) }, ...then));
  const value = (element) => element.value, checked = (element) => (element.checked ? "1" : "");
  for (const id of ["x", "y", "level"]) on(id, "change", value, pareto);
  on("log", "change", checked, pareto);
  on("front", "change", checked, tellAll);
  on("brushing", "change", checked, () => Object.keys(views).forEach(draw));
  on("task", "change", value, () => { picked = []; Object.assign(state, { arm: "", first: "", second: "" }); writeAddress(); drawAll(); });
  on("words", "input", value, () => { clearTimeout(settling); settling = setTimeout(drawAll, 250); });
  on("theme", "change", value, paint);
  on("shade", "change", value, drawBlocks);
  for (const id of ["first", "second", "by"]) on(id, "change", value, () => drawExamples());
  byId("clear").addEventListener("click", () => { picked = []; byId("words").value = ""; set({ words: "", arm: "" }, drawAll); light(-1); });
  byId("example-words").addEventListener("input", () => drawExamples());
  byId("examples-more").addEventListener("click", () => { mostExamples = Infinity; drawExamples(); });
  byId("table-choice").addEventListener("change", () => set({ table: byId("table-choice").value, sort: "" }, chooseTable));
  byId("table-search").addEventListener("input", drawTable);
  byId("table-more").addEventListener("click", () => { table.most = Infinity; drawTable(); });
  for (const [kind, name] of [["latex", "LaTeX"], ["markdown", "Markdown"]]) byId("copy-" + kind).addEventListener("click", () => copy(table.sheet[kind], `${name} of this table`));
  // a link to a section moves there and leaves the state in the address
  document.addEventListener("click", (event) => {
    const link = event.target.closest && event.target.closest('a[href^="#"]');
    if (!link) return;
    event.preventDefault();
    byId(link.getAttribute("href").slice(1)).scrollIntoView();
  });
  addEventListener("hashchange", () => { readAddress(); paint(); everything(); });
  addEventListener("keydown", (event) => { if (event.key === "Escape" && chosen() >= 0 && !byId("large").open) close(); });
  dark.addEventListener("change", paint);
}

function everything() {
  controls();
  lit = chosen();
  for (const id of ["explore", "curves"]) byId(id).hidden = !rows.arms.length;
  drawAll();
  chooseTable();
}

// A page that watches a running study gives it here what has changed of the data: tables, cards, layouts, counts.
function update(changes) {
  Object.assign(data, changes, { tables: { ...data.tables, ...(changes.tables || {}) } });
  byId("counts").textContent = data.counts;
  list(byId("answer-list"), data.answers);
  readRows();
  everything();
}

readRows();
readAddress();
paint();
begin();
everything();
window.atlas = { data, state, views, update };
