"use strict";
const walk = JSON.parse(document.getElementById("walk").textContent);
const tokens = walk.tokens.map((token) => token.text);
const first = walk.window.first, shown = tokens.slice(first);
const dark = matchMedia("(prefers-color-scheme: dark)");
const redraw = [];
const FONT = "12px ui-monospace, monospace";
const WIDEST = 760; // pixels of a map

// --- words ------------------------------------------------------------------------------------------

function visible(text) {
  return Array.from(text, (c) => (c === "\n" ? "\\n" : c === "\t" ? "\\t" : /[\p{C}\p{Zl}\p{Zp}]/u.test(c) ? "\\u" + c.codePointAt(0).toString(16) : c)).join("");
}
const short = (text) => visible(text).replace(/ /g, "␣");
function percent(share) {
  const value = 100 * share;
  return (value < 0.005 ? "0" : value.toFixed(value >= 9.95 ? 0 : value >= 0.995 ? 1 : 2)) + " %";
}
const count = (number) => number.toLocaleString("en");
const figure = (number) => (Math.abs(number) >= 1e4 || (number !== 0 && Math.abs(number) < 1e-3) ? number.toExponential(2) : Number(number.toPrecision(4)).toLocaleString("en", { maximumSignificantDigits: 4 }));
const shape = (sizes) => "[" + sizes.join(", ") + "]";
function bytes(number) {
  const units = ["B", "KiB", "MiB", "GiB", "TiB"];
  let unit = 0;
  while (number >= 1024 && unit < 4) { number /= 1024; unit += 1; }
  return (unit === 0 || number >= 10 ? number.toFixed(0) : number.toFixed(1)) + " " + units[unit];
}

// --- elements; text is always set as text, so a token cannot become markup ---------------------------

function make(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (value !== false && value !== null) element.setAttribute(name, value === true ? "" : value);
  }
  element.append(...children.filter((child) => child !== null));
  return element;
}
const at = (id) => document.getElementById(id);
const put = (id, ...children) => at(id).replaceChildren(...children);

function table(header, rows, right = []) {
  const side = (i) => (right.includes(i) ? { class: "right" } : {});
  const cells = (row, tag) => row.map((cell, i) => make(tag, { ...side(i), ...(tag === "th" ? { scope: "col" } : {}) }, cell));
  const lines = rows.map((row) => make("tr", row.plain ? { class: "plain" } : {}, ...cells(row, "td")));
  const head = make("thead", {}, make("tr", {}, ...cells(header, "th")));
  return make("div", { class: "scroll", tabindex: "0", role: "region", "aria-label": "table" }, make("table", {}, head, make("tbody", {}, ...lines)));
}

function stepTable(steps, above) {
  const rows = [];
  for (const step of steps) {
    const gives = step.shape.length ? shape(step.shape) : "", rms = step.rms === null ? "" : figure(step.rms);
    if (!step.tables.length) {
      rows.push(Object.assign([step.what, step.said, "", "", "", gives, rms], { plain: true }));
    }
    step.tables.forEach((each, i) => {
      const name = make("code", {}, each.name.startsWith(above) ? each.name.slice(above.length) : each.name);
      const ends = i === 0 ? [gives, rms] : ["", ""];
      rows.push([i === 0 ? step.what : "", name, shape(each.shape) + " " + each.dtype, bytes(each.bytes), percent(each.share), ...ends]);
    });
  }
  return table(["step", "weights", "shape", "size", "share", "gives", "rms"], rows, [3, 4, 6]);
}

// --- numbers ----------------------------------------------------------------------------------------

function unpack(packed) {
  const raw = Uint8Array.from(atob(packed.data), (c) => c.charCodeAt(0));
  const [planes, height, width] = packed.shape;
  const wide = packed.kind === "share" ? new Uint16Array(raw.buffer) : raw;
  const span = (packed.high - packed.low) / 65535;
  const read = packed.kind === "share" ? (i) => packed.low + wide[i] * span : (i) => wide[i];
  return { planes, height, width, low: packed.low, high: packed.high, at: (p, r, c) => read(((planes > 1 ? p : 0) * height + r) * width + c) };
}

// --- colours ----------------------------------------------------------------------------------------

const SCALES = {
  light: { share: ["#f3f7fb", "#c6dbef", "#6baed6", "#2171b5", "#08306b"], sign: ["#b2182b", "#f4a582", "#f7f7f5", "#92c5de", "#2166ac"] },
  dark: { share: ["#1a2028", "#153f63", "#1f6f9f", "#52b6c9", "#eaf7c9"], sign: ["#ff9d7a", "#8a3f2d", "#20262e", "#25617f", "#86d3ff"] },
};
const PARTS = { light: ["#1f5fa8", "#b3470e", "#2f7d4f", "#7a5aa6", "#8a7a1f"], dark: ["#7ab7f5", "#f0a070", "#7fd09c", "#c4a6ee", "#d9c96a"] };
const mode = () => (dark.matches ? "dark" : "light");
const rgb = (hex) => [1, 3, 5].map((i) => parseInt(hex.slice(i, i + 2), 16));
function mixed(stops, share) {
  const place = Math.min(Math.max(share, 0), 1) * (stops.length - 1), low = Math.min(Math.floor(place), stops.length - 2);
  const [a, b] = [rgb(stops[low]), rgb(stops[low + 1])];
  return a.map((value, i) => Math.round(value + (b[i] - value) * (place - low)));
}
const css = (colour) => `rgb(${colour.join(",")})`;
const inkOn = (colour) => (0.299 * colour[0] + 0.587 * colour[1] + 0.114 * colour[2] > 140 ? "#111" : "#fff");
const style = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();

/** From a value to its place on a scale: shares from 0 to 1, signs from -most to most. */
function placed(value, kind, most) {
  return kind === "share" ? Math.sqrt(Math.max(value, 0) / most) : 0.5 + value / (2 * most);
}

// --- a map of numbers: drawn on a canvas, read by mouse, finger or arrow keys -------------------------

function heatMap(options) {
  const { rows, columns, value, kind, most, hidden = () => false, tell, label } = options;
  const canvas = make("canvas", { tabindex: "0", role: "img", "aria-label": label + "; arrow keys move over the cells" });
  const said = make("p", { class: "said", "aria-live": "polite" }, "Point at a cell, or focus the map and use the arrow keys.");
  const frame = make("div", { class: "scroll map" }, canvas), box = make("div", {}, frame, said, legend(kind, most, options.masks));
  let cell = 10, left = 60, top = 14, mark = null;
  const named = columns.length > 0 && options.heads !== false;

  function draw() {
    const room = box.clientWidth || 640, phone = room < 480;
    left = phone ? 64 : 96;
    const pen = canvas.getContext("2d");
    pen.font = FONT;
    const longest = Math.max(0, ...columns.map((text) => pen.measureText(text).width));
    top = named ? Math.min(phone ? 44 : 64, Math.ceil(longest) + 8) : 4;
    cell = Math.max(named ? 11 : 4, Math.min(30, Math.floor((Math.min(room, WIDEST) - left - 2) / Math.max(value.width, 1))));
    const tall = Math.max(15, Math.min(cell, 30, 720 / value.height)), width = left + cell * value.width + 1, height = top + tall * value.height + 1;
    const ratio = devicePixelRatio || 1;
    canvas.width = width * ratio; canvas.height = height * ratio;
    canvas.style.width = width + "px"; canvas.style.height = height + "px";
    canvas.tall = tall;
    pen.scale(ratio, ratio);
    pen.font = FONT; // a canvas forgets it with its size
    const scale = SCALES[mode()][kind], masked = style("--masked"), ink = style("--soft");
    for (let r = 0; r < value.height; r += 1) {
      for (let c = 0; c < value.width; c += 1) {
        pen.fillStyle = hidden(r, c) ? masked : css(mixed(scale, placed(value.at(r, c), kind, most)));
        pen.fillRect(left + c * cell, top + r * tall, cell > 6 ? cell - 1 : cell, tall - 1);
      }
      pen.fillStyle = ink; pen.textAlign = "right"; pen.textBaseline = "middle";
      pen.fillText(cut(pen, rows[r], left - 8), left - 6, top + (r + 0.5) * tall);
    }
    if (named) {
      pen.textAlign = "left";
      for (let c = 0; c < value.width; c += 1) {
        pen.save();
        pen.translate(left + (c + 0.5) * cell, top - 4);
        pen.rotate(-Math.PI / 2);
        pen.fillStyle = ink;
        pen.fillText(cut(pen, columns[c], top - 8), 0, 0);
        pen.restore();
      }
    }
    if (mark) {
      pen.strokeStyle = style("--ink"); pen.lineWidth = 2;
      pen.strokeRect(left + mark[1] * cell - 0.5, top + mark[0] * tall - 0.5, cell, tall);
    }
  }
  function choose(r, c) {
    mark = [Math.min(Math.max(r, 0), value.height - 1), Math.min(Math.max(c, 0), value.width - 1)];
    said.replaceChildren(...tell(...mark));
    draw();
  }
  function point(event) {
    const place = canvas.getBoundingClientRect();
    const c = Math.floor((event.clientX - place.left - left) / cell), r = Math.floor((event.clientY - place.top - top) / canvas.tall);
    if (c >= 0 && c < value.width && r >= 0 && r < value.height && !(mark && mark[0] === r && mark[1] === c)) choose(r, c);
  }
  const steps = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] };
  canvas.addEventListener("pointermove", point);
  canvas.addEventListener("pointerdown", point);
  canvas.addEventListener("focus", () => { if (!mark) choose(value.height - 1, 0); });
  canvas.addEventListener("keydown", (event) => {
    const step = steps[event.key], [r, c] = mark || [value.height - 1, 0];
    if (step) choose(r + step[0], c + step[1]);
    else if (event.key === "Home") choose(r, 0);
    else if (event.key === "End") choose(r, value.width - 1);
    else return;
    event.preventDefault();
    frame.scrollLeft = Math.max(0, mark[1] * cell - frame.clientWidth / 2);
  });
  box.draw = draw;
  return box;
}

function cut(pen, text, room) {
  if (pen.measureText(text).width <= room) return text;
  while (text && pen.measureText(text + "…").width > room) text = text.slice(0, -1);
  return text + "…";
}

function legend(kind, most, masks) {
  const strip = make("i"), ends = kind === "share" ? ["0", most === 1 ? "1" : figure(most)] : [figure(-most), figure(most)];
  const paint = () => { strip.style.background = `linear-gradient(to right, ${Array.from({ length: 11 }, (_, i) => css(mixed(SCALES[mode()][kind], placed(kind === "share" ? (i / 10) * most : (i / 5 - 1) * most, kind, most)))).join(",")})`; };
  paint();
  const line = make("div", { class: "scale" }, ends[0], strip, ends[1], ...(masks ? [make("u"), "hidden by the mask"] : []));
  line.paint = paint;
  return line;
}

const strong = (text) => make("b", {}, "“" + visible(text) + "”");

// --- the sections -----------------------------------------------------------------------------------

function showTokens() {
  const { architecture: a, ...model } = walk.model;
  const heads = [undefined, a.num_attention_heads].includes(a.num_key_value_heads) ? `${a.num_attention_heads} heads` : `${a.num_attention_heads} query heads, ${a.num_key_value_heads} of keys and values`;
  const attends = walk.layers.some((layer) => layer.pattern !== "mamba2");
  put("model", make("code", {}, model.path), `: ${count(model.parameters)} parameters, ${model.dtype}, ${bytes(model.bytes)}; ${walk.layers.length} layers, ${attends ? heads + ", " : ""}width ${count(a.hidden_size)}`);
  put("tokens-said", `The tokenizer cuts the text into ${count(tokens.length)} pieces, of at most ${count(a.max_position_embeddings)}, and gives each its id.`);
  put("chips", ...walk.tokens.map((token) => make("li", {}, make("b", {}, short(token.text)), make("small", {}, String(token.id)))));
}

function showEmbedding() {
  put("embedding-steps", stepTable([walk.embedding], ""));
  const rows = walk.embedding.rows, most = Math.max(...rows.flat().map(Math.abs), 1e-9);
  at("rows-title").textContent = `The first ${rows[0].length} of ${count(walk.model.architecture.hidden_size)} numbers of each row that enters layer 0`;
  const box = heatMap({
    rows: shown.map(short), columns: [], kind: "sign", most, label: "embedding rows",
    value: { height: rows.length, width: rows[0].length, at: (r, c) => rows[r][c] },
    tell: (r, c) => [strong(shown[r]), ` channel ${c}: ${figure(rows[r][c])}`],
  });
  put("rows", box);
  redraw.push(box);
}

const POSITIONS = {
  rope: "Rotary: in each layer, pairs of channels of queries and keys are turned by an angle that grows with the position, so that their product depends on their distance.",
  learned: "Learned: a row of a second table, one for each position, is added to each token's row.",
  sinusoidal: "Sinusoidal: sine and cosine waves of the position are added to each token's row.",
  relative: "Relative: a learned number for the distance of query and key is added to each score.",
  alibi: "ALiBi: a number that falls with the distance of query and key is added to each score, steeper in some heads than in others.",
  none: "None: nothing tells a token where it stands, other than what the mask hides.",
};

function showPositions() {
  put("positions-said", POSITIONS[walk.positions.kind]);
  const turns = walk.positions.turns;
  if (walk.positions.tables.length) put("turns", stepTable([walk.positions], ""));
  if (!turns.length) return;
  const some = [...new Set([0, 1, 2, 3, 4, 5].map((i) => Math.round((i * (turns.length - 1)) / 5)))];
  const last = tokens.length - 1;
  at("turns").append(table(["pair", "turn a token", "goes round in", `angle at place ${last}`], some.map((i) => [String(i), figure(turns[i]) + " rad", figure((2 * Math.PI) / turns[i]) + " tokens", figure((turns[i] * last) % (2 * Math.PI)) + " rad"]), [0, 1, 2, 3]));
}

const VIEWS = { weights: "weights", before: "scores before the mask", after: "scores after the mask" };
const state = { layer: walk.open, head: 0, view: "weights" };

function showLayers() {
  const chosen = at("layer");
  put("layers-said", `${walk.layers.length} layers, one after the other. Each reads the stream, mixes the tokens by attention, then works on each by itself, and adds both to the stream.` + (first ? ` The maps show the last ${shown.length} of ${count(tokens.length)} tokens.` : ""));
  chosen.append(...walk.layers.map((layer) => make("option", { value: layer.layer, selected: layer.layer === state.layer }, `${layer.layer} (${layer.pattern})`)));
  chosen.addEventListener("change", () => { state.layer = Number(chosen.value); showLayer(); });
  showLayer();
}

let layerMaps = [];

function showLayer() {
  const layer = walk.layers[state.layer];
  layerMaps = [];
  at("layer-said").textContent = `${count(layer.parameters)} parameters, ${bytes(layer.bytes)}, ${percent(layer.share)} of the model`;
  const none = layer.steps.find((step) => step.what === "scores" && !step.shape.length);
  put("mixers", ...layer.attention.map(showMixer), ...(none ? [make("p", { class: "soft" }, none.said + ".")] : []));
  put("routing", ...(layer.routing ? showRouting(layer) : []));
  at("steps-title").textContent = `Layer ${layer.layer}, step by step`;
  put("steps", stepTable(layer.steps, `model.layers.${layer.layer}.`));
  layerMaps.forEach((box) => box.draw());
}

function showMixer(each) {
  const scores = unpack(each.scores), allowed = unpack(each.allowed), weights = unpack(each.weights);
  const most = Math.max(Math.abs(scores.low), Math.abs(scores.high), 1e-9);
  const place = make("div"), many = each.heads > 1;
  state.head = Math.min(state.head, each.heads - 1);
  const thumbs = Array.from({ length: each.heads }, (_, head) => {
    const canvas = make("canvas", { width: weights.width, height: weights.height, "aria-hidden": "true" });
    const button = make("button", { type: "button", "aria-pressed": String(head === state.head), "aria-label": `head ${head}`, onclick: () => { state.head = head; show(); } }, canvas, String(head));
    button.paint = () => thumbnail(canvas, weights, head);
    return button;
  });
  const radios = Object.entries(VIEWS).map(([name, words]) => make("label", {}, make("input", { type: "radio", name: "view-" + each.module, value: name, checked: name === state.view, onchange: () => { state.view = name; show(); } }), " " + words));
  function show() {
    const head = state.head, view = state.view, share = view === "weights";
    thumbs.forEach((button, i) => { button.setAttribute("aria-pressed", String(i === head)); button.paint(); });
    const value = { height: weights.height, width: weights.width, at: (r, c) => (share ? weights : scores).at(head, r, c) };
    const box = heatMap({
      rows: shown.map(short), columns: shown.map(short), kind: share ? "share" : "sign", most: share ? 1 : most, value, masks: view !== "before",
      label: `${words(view)} of head ${head}, layer ${state.layer}`,
      hidden: (r, c) => view !== "before" && !allowed.at(head, r, c),
      tell: (r, c) => {
        const open = allowed.at(head, r, c);
        const told = view === "before" || open ? figure(value.at(r, c)) : "hidden by the mask";
        const early = share && each.earlier[head][r] > 5e-5 ? `; ${percent(each.earlier[head][r])} on earlier tokens` : "";
        return ["query ", strong(shown[r]), ` (${first + r}) → key `, strong(shown[c]), ` (${first + c}): ${told}${early}`];
      },
    });
    layerMaps = layerMaps.filter((old) => old.owner !== each).concat(Object.assign(box, { owner: each }));
    place.replaceChildren(box);
    box.draw();
  }
  const words = (view) => VIEWS[view];
  const groups = each.kv_heads < each.heads ? ` ${each.heads / each.kv_heads} of them share each head of keys and values.` : "";
  show();
  return make("div", {},
    make("h3", {}, each.module === "self_attn" ? "Attention, head by head" : `Attention of ${each.module}, head by head`),
    make("p", { class: "soft" }, `A row is a query, a column a key. ${each.heads} heads; a score is query · key × ${figure(each.scale)}.${groups}`),
    many ? make("div", { class: "heads", role: "group", "aria-label": "head" }, ...thumbs) : null,
    make("div", { class: "tools" }, make("fieldset", {}, ...radios)), place);
}

function thumbnail(canvas, weights, head) {
  const pen = canvas.getContext("2d"), picture = pen.createImageData(weights.width, weights.height), scale = SCALES[mode()].share;
  for (let r = 0; r < weights.height; r += 1) {
    for (let c = 0; c < weights.width; c += 1) {
      picture.data.set([...mixed(scale, placed(weights.at(head, r, c), "share", 1)), 255], 4 * (r * weights.width + c));
    }
  }
  pen.putImageData(picture, 0, 0);
}

function showRouting(layer) {
  const { load, shares, chosen } = layer.routing, highest = Math.max(...load, 1e-9), most = Math.max(...shares.flat());
  const bars = table(["expert", "share of the work", ""], load.map((share, i) => [String(i), make("span", { class: "bar", style: `width:${(12 * share) / highest}rem` }), percent(share)]), [0, 2]);
  const box = heatMap({
    rows: shown.map(short), columns: shares[0].map((_, i) => String(i)), kind: "share", most, label: `router of layer ${layer.layer}`,
    value: { height: shares.length, width: shares[0].length, at: (r, c) => shares[r][c] },
    tell: (r, c) => [strong(shown[r]), ` (${first + r}) → expert ${c}: ${percent(shares[r][c])}${chosen && chosen[r].includes(c) ? ", chosen" : ""}`],
  });
  layerMaps.push(box);
  const said = chosen ? `The router's probabilities of each token; the ${chosen[0].length} best work on it.` : "The router's probabilities of each token; all experts work on it.";
  return [make("h3", {}, "Experts"), bars, make("p", { class: "soft" }, said), box];
}

function showLens() {
  const levels = [["embedding", walk.lens], ...walk.layers.map((layer) => [`layer ${layer.layer}`, layer.lens])];
  const said = make("p", { class: "said", "aria-live": "polite" }, "Point at a cell, or focus one and use the arrow keys.");
  const cells = levels.map(([name, places]) => places.map((guess, c) => make("td", { tabindex: "-1" }, short(guess.texts[0]))));
  function tell(r, c) {
    const [name, places] = levels[r], guess = places[c];
    const told = guess.texts.flatMap((text, i) => [i ? ", " : "", strong(text), " " + percent(guess.probabilities[i])]);
    said.replaceChildren(`after ${name}, `, strong(shown[c]), ` (${first + c}) → `, ...told);
  }
  function go(r, c) {
    if (!cells[r] || !cells[r][c]) return;
    cells.flat().forEach((cell) => cell.setAttribute("tabindex", "-1"));
    cells[r][c].setAttribute("tabindex", "0");
    cells[r][c].focus();
  }
  const steps = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] };
  cells.forEach((row, r) => row.forEach((cell, c) => {
    cell.addEventListener("pointerenter", () => tell(r, c));
    cell.addEventListener("pointerdown", () => tell(r, c));
    cell.addEventListener("focus", () => tell(r, c));
    cell.addEventListener("keydown", (event) => {
      const step = steps[event.key];
      if (step) { event.preventDefault(); go(r + step[0], c + step[1]); }
    });
  }));
  cells[cells.length - 1][shown.length - 1].setAttribute("tabindex", "0");
  const head = make("thead", {}, make("tr", {}, make("th", {}, ""), ...shown.map((text) => make("th", { scope: "col" }, short(text)))));
  const body = levels.map(([name], r) => make("tr", {}, make("th", { scope: "row" }, name), ...cells[r]));
  put("lens-table", make("div", { class: "scroll" }, make("table", { class: "lens" }, head, make("tbody", {}, ...body))), said, legend("share", 1, false));
  const paint = () => cells.forEach((row, r) => row.forEach((cell, c) => {
    const colour = mixed(SCALES[mode()].share, placed(levels[r][1][c].probabilities[0], "share", 1));
    cell.style.background = css(colour);
    cell.style.color = inkOn(colour);
  }));
  redraw.push({ draw: paint });
}

function showNext() {
  const best = walk.next[0], rest = Math.max(0, 1 - walk.next.reduce((sum, each) => sum + each.probability, 0));
  put("next-said", "After the last norm the head gives a number, a logit, to each entry of the vocabulary; their softmax are the probabilities. Greedy decoding would write ", strong(best.text), ".");
  put("closing", stepTable(walk.closing, ""));
  const rows = walk.next.map((each) => [make("code", {}, short(each.text)), make("span", { class: "bar", style: `width:${(9 * each.probability) / best.probability}rem` }), percent(each.probability), figure(each.logit), String(each.id)]);
  rows.push(["all others", "", percent(rest), "", ""]);
  put("candidates", make("h3", {}, "The likeliest"), table(["token", "", "probability", "logit", "id"], rows, [2, 3, 4]));
}

function showWeights() {
  const parts = Object.entries(walk.parts).filter(([, part]) => part.parameters);
  const pieces = parts.map(([name, part]) => make("i", { style: `flex:${part.parameters}`, title: name }));
  const keys = parts.map(() => make("span", { class: "key" }));
  const rows = parts.map(([name, part], i) => [make("span", {}, keys[i], name), count(part.parameters), percent(part.parameters / walk.model.parameters), bytes(part.bytes)]);
  rows.push(["all", count(walk.model.parameters), "100 %", bytes(walk.model.bytes)]);
  put("parts", make("div", { class: "parts", "aria-hidden": "true" }, ...pieces), table(["part", "parameters", "share", "size"], rows, [1, 2, 3]));
  redraw.push({ draw: () => [pieces, keys].forEach((row) => row.forEach((piece, i) => { piece.style.background = PARTS[mode()][i % 5]; })) });
}

function drawAll() {
  [...redraw, ...layerMaps].forEach((box) => box.draw());
  document.querySelectorAll(".scale").forEach((line) => line.paint());
  document.querySelectorAll(".heads button").forEach((button) => button.paint());
}

showTokens(); showEmbedding(); showPositions(); showLayers(); showLens(); showNext(); showWeights();
drawAll();
dark.addEventListener("change", drawAll);
addEventListener("resize", drawAll);
