// The explorer: the exact map of infinite width beside random networks drawn in this page.
// <div class="explorer" data-views="heat ray" data-controls="width norm" data-width="100"></div>
// is filled with controls and pictures; data-address="" keeps the settings in the address.
"use strict";
(() => {

const INPUTS = 64;

// Infinite width: v^2/sigma^2 and sigma^2 by layer, as svlib.theory.trajectory at He's rule.
// The gap loses (sin t - t cos t)/pi in a layer, cos t = 1 - gap.
function decrement(gap, slope) {
  const t = 2 * Math.asin(Math.sqrt(gap / 2));
  const loss = (Math.sin(t) - t * Math.cos(t)) / Math.PI;
  return loss * (1 - slope) ** 2 / (1 + slope * slope);
}

function theory({ depth, slope, beta, norm }) {
  const fraction = [1], sigma2 = [1], normed = norm !== "none";
  const base = decrement(1, slope);
  for (let layer = 1; layer <= depth; layer++) {
    const q = normed ? 1 + beta * layer : (1 + beta) ** layer;
    const share = !beta ? 1 : normed ? beta / q : beta / (1 + beta);
    const gap = fraction[layer - 1];
    fraction.push(gap - share * (norm === "batch" ? gap - (1 - base) : decrement(gap, slope)));
    sigma2.push(beta ? q : 1);
  }
  return { fraction, sigma2 };
}

// The radial law of finite width for plain ReLU: the lengths of inputs spread by
// (3/2 - J22(angle))/N in each layer, and v^2/m^2 ~ gap/(1 - gap) + that sum.
function law({ depth, width }, fraction) {
  let lengths = 0;
  const ratio = [0];
  for (let layer = 1; layer <= depth; layer++) {
    const t = Math.acos(1 - fraction[layer - 1]), c = Math.cos(t);
    const j22 = ((Math.PI - t) * (2 * c * c + 1) + 3 * Math.sin(t) * c) / (2 * Math.PI);
    lengths += (1.5 - j22) / width;
    ratio.push(1 / Math.sqrt(fraction[layer] / (1 - fraction[layer]) + lengths));
  }
  return ratio;
}

// The next layer's correlation of two inputs; with BatchNorm that behind its normalization.
function mapped({ slope, beta, norm }, rho) {
  const loss = decrement(1 - rho, slope);
  if (norm === "batch") return 1 - (1 - rho - loss) / (1 - decrement(1, slope));
  return rho + (beta ? beta / (1 + beta) : 1) * loss;
}

// Random numbers: sfc32, seeded, and Box and Muller's normal ones.
function generator(seed) {
  let a = 0x9e3779b9, b = 0x243f6a88, c = seed >>> 0, d = 1;
  const next = () => {
    const t = (a + b + d) | 0;
    d = (d + 1) | 0; a = b ^ (b >>> 9); b = (c + (c << 3)) | 0;
    c = ((c << 21) | (c >>> 11)); c = (c + t) | 0;
    return (t >>> 0) / 4294967296;
  };
  for (let i = 0; i < 20; i++) next();
  return next;
}

function normals(next, count, scale) {
  const out = new Float32Array(count + (count & 1));
  for (let i = 0; i < out.length; i += 2) {
    const r = scale * Math.sqrt(-2 * Math.log(1 - next())), t = 2 * Math.PI * next();
    out[i] = r * Math.cos(t); out[i + 1] = r * Math.sin(t);
  }
  return out;
}

// m^2 and v^2 without bias, as svlib.decompose; y holds units by inputs.
function moments(y, width) {
  let m2 = 0, v2 = 0;
  for (let u = 0; u < width; u++) {
    let mean = 0, squares = 0;
    for (let a = 0; a < INPUTS; a++) mean += y[u * INPUTS + a];
    mean /= INPUTS;
    for (let a = 0; a < INPUTS; a++) squares += (y[u * INPUTS + a] - mean) ** 2;
    const variance = squares / (INPUTS - 1);
    m2 += mean * mean - variance / INPUTS; v2 += variance;
  }
  return { m2: m2 / width, v2: v2 / width };
}

// Mean and inverse deviation of the values of one unit over inputs, or of one input over units.
function standard(y, first, stride, count) {
  let mean = 0, squares = 0;
  for (let i = 0; i < count; i++) mean += y[first + i * stride] / count;
  for (let i = 0; i < count; i++) squares += (y[first + i * stride] - mean) ** 2;
  return [mean, 1 / Math.sqrt(squares / count)];
}

function activated(y, width, slope, norm) {
  const out = new Float32Array(y.length), lines = norm === "layer" ? INPUTS : width;
  for (let k = 0; k < lines; k++) {
    const [first, stride, count] = norm === "layer" ? [k, INPUTS, width] : [k * INPUTS, 1, INPUTS];
    const [mean, scale] = norm === "none" ? [0, 1] : standard(y, first, stride, count);
    for (let i = 0; i < count; i++) {
      const z = (y[first + i * stride] - mean) * scale;
      out[first + i * stride] = z > 0 ? z : slope * z;
    }
  }
  return out;
}

// A network: layer 0 is white noise, weights have He's variance for the slope. y: units by inputs.
function simulate({ width, depth, slope, beta, norm, seed }) {
  const next = generator(seed);
  const layers = [normals(next, width * INPUTS, 1)];
  for (let layer = 1; layer <= depth; layer++) {
    const before = layers[layer - 1];
    const a = activated(before, width, slope, norm);
    const w = normals(next, width * width, Math.sqrt(2 / (1 + slope * slope) / width * (beta || 1)));
    const y = beta ? before.slice() : new Float32Array(width * INPUTS);
    for (let u = 0; u < width; u++) {
      const row = y.subarray(u * INPUTS, (u + 1) * INPUTS);
      for (let k = 0; k < width; k++) {
        const weight = w[u * width + k], from = k * INPUTS;
        for (let i = 0; i < INPUTS; i++) row[i] += weight * a[from + i];
      }
    }
    layers.push(y);
  }
  return { layers, measured: layers.map((y) => moments(y, width)) };
}

// The inputs of a layer in the plane of their mean direction and the widest one across it.
function plane(y, width) {
  const mean = new Float64Array(width), across = [];
  for (let u = 0; u < width; u++) for (let a = 0; a < INPUTS; a++) mean[u] += y[u * INPUTS + a] / INPUTS;
  const length = Math.hypot(...mean) || 1;
  const along = new Float64Array(INPUTS);
  for (let u = 0; u < width; u++) for (let a = 0; a < INPUTS; a++) along[a] += y[u * INPUTS + a] * mean[u] / length;
  let w = new Float64Array(INPUTS).map((_, a) => Math.cos(1 + a));
  let d = new Float64Array(width);
  for (let turn = 0; turn < 8; turn++) { // power iterations on what is across
    d = new Float64Array(width);
    for (let u = 0; u < width; u++) {
      for (let a = 0; a < INPUTS; a++) d[u] += (y[u * INPUTS + a] - along[a] * mean[u] / length) * w[a];
    }
    const size = Math.hypot(...d) || 1;
    d = d.map((x) => x / size);
    w = new Float64Array(INPUTS);
    for (let u = 0; u < width; u++) {
      for (let a = 0; a < INPUTS; a++) w[a] += (y[u * INPUTS + a] - along[a] * mean[u] / length) * d[u];
    }
  }
  for (let a = 0; a < INPUTS; a++) across.push(w[a]);
  return { along: [...along], across };
}

// Degrees between the first two inputs.
function angle(y, width) {
  let both = 0, one = 0, two = 0;
  for (let u = 0; u < width; u++) {
    const [a, b] = [y[u * INPUTS], y[u * INPUTS + 1]];
    both += a * b; one += a * a; two += b * b;
  }
  return Math.acos(Math.max(-1, Math.min(1, both / Math.sqrt(one * two)))) * 180 / Math.PI;
}

window.svlibExplorer = { theory, law, simulate: (given) => simulate(given).measured };

const PAINT = { m: "#0072B2", v: "#B07800", line: "#404040", one: "#D55E00" };
const TEXT = "#505050";
const NETWORKS = 10;
const CHOICES = {
  width: ["width", [16, 256, 4]],
  slope: ["slope of the activation (0: ReLU, 1: linear)", [0, 1, 0.05]],
  seed: ["random seed", [1, 40, 1]],
  depth: ["depth", [[10, 20, 50, 100, 500, 2000]]],
  bend: ["bend", [[["0", "slope as set"], ["1", "slope 1 − 1/√depth"]]]],
  beta: ["residual branches, β", [[["0", "no skip connections"], 0.01, 0.1, 0.3, 1]]],
  norm: ["normalization", [[["none", "none"], ["layer", "LayerNorm"], ["batch", "BatchNorm"]]]],
};
const USUAL = { width: 100, slope: 0, seed: 18, depth: 50, bend: 0, beta: 0, norm: "none", layer: 0 };
const TITLES = {
  heat: "Units (rows) × inputs (columns)", ray: "The inputs as arrows",
  curves: "Layer by layer", stairs: "The map, a step for each layer",
};

function made(tag, attributes = {}, ...inside) {
  const element = document.createElement(tag);
  Object.entries(attributes).forEach(([name, value]) => element.setAttribute(name, value));
  element.append(...inside);
  return element;
}

function control(name, value) {
  const [label, [...range]] = CHOICES[name];
  const told = made("output");
  let input;
  if (range.length === 3) {
    const [min, max, step] = range;
    input = made("input", { type: "range", name, min, max, step, value });
  } else {
    input = made("select", { name }, ...range[0].map((x) => {
      const [key, text] = Array.isArray(x) ? x : [x, x];
      return made("option", String(key) === String(value) ? { value: key, selected: "" } : { value: key }, String(text));
    }));
  }
  return made("label", {}, `${label} `, range.length === 3 ? told : "", input);
}

function fill(root) {
  const settings = { ...USUAL };
  const keys = Object.keys(USUAL);
  keys.forEach((key) => { if (key in root.dataset) settings[key] = root.dataset[key]; });
  const addressed = "address" in root.dataset;
  const asked = () => Object.fromEntries([...new URLSearchParams(location.hash.slice(1))].filter(([key]) => key in USUAL));
  if (addressed) Object.assign(settings, asked());
  const views = root.dataset.views.split(" "), names = (root.dataset.controls || "").split(" ").filter(Boolean);
  const still = window.matchMedia("(prefers-reduced-motion: reduce)");
  const controls = made("div", { class: "controls" }, ...names.map((name) => control(name, settings[name])));
  const slider = made("input", { type: "range", name: "layer", min: 0, max: 50, step: 1, value: settings.layer });
  const layer = made("span", {}, "layer 0"), meter = made("span"), told = made("p", { class: "told", "aria-live": "polite" });
  const play = made("button", { type: "button", class: "play", "aria-pressed": "false" }, "Play");
  const back = made("button", { type: "button", "aria-label": "one layer back" }, "◂"), on = made("button", { type: "button", "aria-label": "one layer on" }, "▸");
  const bar = made("div", { class: "bar" }, play, back, on, made("label", {}, layer, slider));
  const share = made("div", { class: "meter", role: "img" }, meter);
  const canvases = Object.fromEntries(views.map((view) => [view, made("canvas", { class: view, role: "img", "aria-label": TITLES[view] })]));
  const boxes = views.map((view) => made("div", { class: `view ${view}` }, made("div", { class: "title" }, TITLES[view]), canvases[view]));
  const link = made("a", { class: "open" }, "Open in the explorer");
  root.replaceChildren(controls, bar, share, made("div", { class: "views" }, ...boxes), told);
  if (!addressed) root.append(link);
  told.hidden = !("curves" in canvases) && !("stairs" in canvases);
  const inputs = Object.fromEntries([...root.querySelectorAll("[name]")].map((x) => [x.name, x]));
  let exact, runs = [], given, timer = null, waiting = null, turn = 0;
  const drawn = () => given.depth <= 100; // deeper, the exact line alone
  const shown = () => Math.min(Number(slider.value), given.depth);

  function canvas(view, height) {
    const element = canvases[view], box = element.parentElement.clientWidth;
    const sharp = window.devicePixelRatio || 1;
    element.width = box * sharp; element.height = height * sharp;
    element.style.height = `${height}px`;
    const context = element.getContext("2d");
    context.scale(sharp, sharp);
    context.font = "13px sans-serif"; context.fillStyle = TEXT; context.strokeStyle = TEXT;
    return { context, box };
  }

  const square = (view) => Math.max(140, Math.min(220, canvases[view].parentElement.clientWidth));
  const ratio = ({ m2, v2 }) => m2 > 0 ? Math.sqrt(m2 / v2) : 0;
  const infinite = (l) => Math.sqrt((1 - exact.fraction[l]) / exact.fraction[l]);

  function curves() {
    const layers = exact.fraction.map((_, l) => l), measured = drawn() ? runs[0].measured : null;
    const over = (pick) => layers.map((l) => pick(exact.fraction[l]));
    const own = (pick) => measured && measured.map((x) => { const value = pick(x, Math.max(x.m2, 0) + x.v2); return isNaN(value) ? null : value; });
    const panels = [
      [measured ? "over σ: lines exact, dots one network" : "over σ, infinite width", [
        [PAINT.m, [], over((g) => Math.sqrt(1 - g)), own((x, q) => Math.sqrt(x.m2 / q)), "m"],
        [PAINT.v, [7, 4], over(Math.sqrt), own((x, q) => Math.sqrt(x.v2 / q)), "v"]]],
      ["m/v", [
        ...(measured ? runs.map((run) => ["pale", [], run.measured.map(ratio), null, ""]) : []),
        ...(measured && runs.length > 1 ? [[PAINT.m, [], layers.map((l) => runs.reduce((sum, run) => sum + ratio(run.measured[l]) / runs.length, 0)), null, `mean of ${runs.length}`]] : []),
        [PAINT.line, [7, 4], layers.map(infinite), null, "infinite width"],
        ...(exact.law ? [[PAINT.one, [2, 3], exact.law, null, "law of width N"]] : [])]],
    ];
    const { context, box } = canvas("curves", 400), left = 40, right = box - 104;
    panels.forEach(([title, lines], index) => {
      const top = 24 + index * 196, bottom = top + 140, depth = given.depth;
      const ends = index ? lines.filter(([colour]) => colour !== "pale") : lines;
      const high = index ? Math.max(1, ...lines.flatMap(([, , line]) => line)) * 1.05 : 1.1;
      const x = (l) => left + (right - left) * l / depth, y = (value) => bottom - (bottom - top) * value / high;
      context.fillStyle = context.strokeStyle = TEXT; context.lineWidth = 1;
      context.beginPath(); context.moveTo(left, top); context.lineTo(left, bottom); context.lineTo(right, bottom); context.stroke();
      context.fillText(title, left, top - 8);
      (index ? [0, high / 2, high] : [0, 0.5, 1]).forEach((value) => context.fillText(String(Number(value.toPrecision(2))), 4, y(value) + 4));
      [0, depth / 2, depth].forEach((l) => context.fillText(String(l), x(l) - 6, bottom + 17));
      context.fillText("layer", (left + right) / 2 + 34, bottom + 17);
      const tags = ends.map(([, , line]) => y(line[depth]) + 4).map((at, k) => [at, k]).sort((a, b) => a[0] - b[0]);
      tags.forEach((tag, k) => { if (k) tag[0] = Math.max(tag[0], tags[k - 1][0] + 15); });
      lines.forEach(([colour, dash, line, points, label]) => {
        const pale = colour === "pale";
        context.strokeStyle = context.fillStyle = pale ? PAINT.m : colour;
        context.globalAlpha = pale ? 0.25 : 1; context.lineWidth = pale ? 1 : 2; context.setLineDash(dash);
        context.beginPath();
        line.forEach((value, l) => context[l ? "lineTo" : "moveTo"](x(l), y(value)));
        context.stroke(); context.setLineDash([]); context.globalAlpha = 1;
        (points || []).forEach((value, l) => {
          if (value === null) return;
          context.beginPath(); context.arc(x(l), y(value), 2.4, 0, 7); context.fill();
        });
        if (!pale) context.fillText(label, right + 6, tags.find(([, k]) => ends[k][2] === line)[0]);
      });
      context.strokeStyle = TEXT; context.lineWidth = 1;
      context.beginPath(); context.moveTo(x(shown()), top); context.lineTo(x(shown()), bottom); context.stroke();
    });
  }

  function heat() {
    const tall = square("heat"), { context, box } = canvas("heat", tall + 34);
    const y = runs[0].layers[shown()], units = Math.min(given.width, 40);
    const { m2, v2 } = runs[0].measured[shown()], scale = Math.sqrt(Math.max(m2, 0) + v2);
    const w = box / INPUTS, h = tall / units;
    const colour = (x) => {
      const strong = Math.min(1, Math.abs(x) / 2.5), goal = x > 0 ? [178, 40, 20] : [10, 80, 170];
      return `rgb(${goal.map((part) => Math.round(250 + (part - 250) * strong)).join()})`;
    };
    for (let u = 0; u < units; u++) {
      for (let a = 0; a < INPUTS; a++) {
        context.fillStyle = colour(y[u * INPUTS + a] / scale);
        context.fillRect(a * w, u * h, w + 0.5, h + 0.5);
      }
    }
    const long = Math.min(200, box - 104);
    for (let k = 0; k < 100; k++) { context.fillStyle = colour(k / 20 - 2.5); context.fillRect(52 + long * k / 100, tall + 8, long / 100 + 0.5, 10); }
    context.fillStyle = TEXT;
    context.fillText("−2.5 σ", 2, tall + 18); context.fillText("2.5 σ", 60 + long, tall + 18);
  }

  function ray() {
    const tall = square("ray") + 34, { context, box } = canvas("ray", tall), y = runs[0].layers[shown()], middle = tall / 2;
    const { along, across } = plane(y, given.width);
    const { m2, v2 } = runs[0].measured[shown()], scale = Math.sqrt(given.width * (Math.max(m2, 0) + v2));
    const x0 = box / 4.6, unit = Math.min((box - x0) / 1.75, 100), x = (a) => x0 + unit * along[a] / scale, z = (a) => middle - unit * across[a] / scale;
    context.setLineDash([3, 4]); context.beginPath(); context.moveTo(x0, middle); context.lineTo(box, middle); context.stroke(); context.setLineDash([]);
    context.fillText("common ray →", box - 96, tall - 8); context.fillText("0", x0 - 14, middle + 5);
    const arrow = (a, colour, strong) => {
      context.strokeStyle = context.fillStyle = colour; context.lineWidth = strong ? 2 : 1;
      context.globalAlpha = strong ? 1 : 0.35; context.beginPath(); context.moveTo(x0, middle); context.lineTo(x(a), z(a)); context.stroke();
      context.globalAlpha = 1; context.beginPath(); context.arc(x(a), z(a), strong ? 4 : 2.5, 0, 7); context.fill();
    };
    for (let a = 2; a < INPUTS; a++) arrow(a, PAINT.m, false);
    arrow(0, PAINT.one, true); arrow(1, PAINT.one, true);
    const wide = box > 240 ? "angle of the orange two: " : "angle ";
    context.fillText(`${wide}${angle(y, given.width).toFixed(0)}°`, 4, 14);
  }

  function stairs() {
    const tall = 280, { context, box } = canvas("stairs", tall), size = Math.min(box - 60, tall - 46), left = 44, bottom = size + 12;
    const x = (value) => left + size * value, y = (value) => bottom - size * value;
    const path = (points, colour, dash, width) => {
      context.strokeStyle = colour; context.lineWidth = width; context.setLineDash(dash); context.beginPath();
      points.forEach(([a, b], k) => context[k ? "lineTo" : "moveTo"](x(a), y(b))); context.stroke(); context.setLineDash([]);
    };
    const batch = given.norm === "batch", grid = [...Array(101).keys()].map((k) => k / 100);
    path([[0, 1], [0, 0], [1, 0]], TEXT, [], 1); path([[0, 0], [1, 1]], TEXT, [2, 3], 1);
    path(grid.map((rho) => [rho, mapped(given, rho)]), PAINT.m, [], 2);
    let rho = batch ? 0.98 : 0; const steps = [[rho, batch ? rho : 0]];
    for (let l = 0; l < shown(); l++) { const up = mapped(given, rho); steps.push([rho, up], [up, up]); rho = up; }
    path(steps, PAINT.one, [], 1.5);
    context.fillStyle = PAINT.one; context.beginPath(); context.arc(x(rho), y(batch || shown() ? rho : 0), 4, 0, 7); context.fill();
    context.fillStyle = TEXT;
    [0, 0.5, 1].forEach((v) => { context.fillText(String(v), x(v) - 4, bottom + 16); context.fillText(String(v), left - 26, y(v) + 4); });
    context.fillText("correlation of two inputs ρ, next layer's above it", left, bottom + 32);
    const slope = batch ? 1 / (1 - decrement(1, given.slope)) : 1;
    context.fillText(`ρ = ${rho.toFixed(3)}`, left + 8, 30); context.fillText(`slope at 1: ${slope.toFixed(2)}`, left + 8, 48);
  }

  function tell() {
    const l = shown(), at = drawn() ? runs[0].measured[l] : null;
    const part = at ? at.v2 / (Math.max(at.m2, 0) + at.v2) : exact.fraction[l];
    const words = part > 0.5 ? "inputs differ along every row" : part > 0.2 ? "rows begin to show" : "every row has nearly one colour";
    layer.textContent = `layer ${l}`;
    meter.style.width = `${100 * part}%`;
    share.setAttribute("aria-label", `variance over inputs, share of the total: ${(100 * part).toPrecision(2)} per cent`);
    share.dataset.told = `v²/σ² = ${part.toPrecision(2)}`;
    const line = infinite(given.depth).toFixed(2), end = at && ratio(runs[0].measured[given.depth]).toFixed(2);
    told.textContent = at
      ? `m/v = ${ratio(at).toFixed(2)} at layer ${l}. At layer ${given.depth} this network has ${end}, infinite width ${line}.`
      : `m/v = ${infinite(l).toFixed(2)} at layer ${l}, ${line} at layer ${given.depth}, at infinite width. No network is drawn beyond 100 layers.`;
    const label = { heat: `Heat map of units by inputs at layer ${l}: ${words}.`, ray: `The 64 inputs of layer ${l} in a plane: ${part < 0.2 ? "they lie close to one ray" : "they are spread"}.`,
      curves: `Curves of m, v and m over v by layer. m over v at layer ${given.depth}: ${line} at infinite width.`, stairs: `Staircase of the correlation map after ${l} layers.` };
    views.forEach((view) => canvases[view].setAttribute("aria-label", label[view]));
  }

  function draw() {
    const unknown = given.beta && given.norm !== "none"; // the map then differs from layer to layer
    boxes.forEach((box, k) => { box.hidden = views[k] === "stairs" ? unknown : !drawn() && views[k] !== "curves"; });
    const all = { curves, heat, ray, stairs };
    views.forEach((view, k) => { if (!boxes[k].hidden) all[view](); });
    tell();
  }

  function more(mine) { // further networks, one at a time, for the mean
    if (mine !== turn || runs.length >= NETWORKS || !drawn()) return;
    runs.push({ measured: simulate({ ...given, seed: given.seed + runs.length }).measured });
    if (runs.length === NETWORKS) draw(); else setTimeout(more, 0, mine);
  }

  function compute() {
    const read = (name) => name in inputs ? inputs[name].value : settings[name];
    given = Object.fromEntries(keys.map((key) => [key, key === "norm" ? read(key) : Number(read(key))]));
    if (given.bend) given.slope = 1 - 1 / Math.sqrt(given.depth);
    names.forEach((name) => { const output = inputs[name].parentElement.querySelector("output"); if (output) output.textContent = inputs[name].value; });
    exact = theory(given);
    exact.law = !given.slope && !given.beta && given.norm === "none" ? law(given, exact.fraction) : null;
    runs = drawn() ? [simulate(given)] : [];
    slider.max = given.depth;
    const address = new URLSearchParams(keys.filter((key) => key !== "layer").map((key) => [key, read(key)])).toString();
    link.href = `explorer.html#${address}`;
    if (addressed && turn) history.replaceState(null, "", `#${address}`);
    root.state = { given, fraction: exact.fraction, sigma2: exact.sigma2, law: exact.law, measured: runs.length ? runs[0].measured : null };
    draw();
    turn += 1;
    if (views.includes("curves")) setTimeout(more, 30, turn);
  }

  function stop() { clearInterval(timer); timer = null; play.textContent = "Play"; play.setAttribute("aria-pressed", "false"); }
  function step(by) { slider.value = (shown() + by + given.depth + 1) % (given.depth + 1); draw(); }
  play.addEventListener("click", () => {
    if (timer !== null) { stop(); return; }
    if (shown() === given.depth) slider.value = 0;
    if (still.matches) { slider.value = given.depth; draw(); return; } // no motion: to the end
    play.textContent = "Stop"; play.setAttribute("aria-pressed", "true");
    const by = Math.max(1, Math.round(given.depth / 100));
    timer = setInterval(() => { step(Math.min(by, given.depth - shown())); if (shown() === given.depth) stop(); }, 150);
  });
  back.addEventListener("click", () => { stop(); step(-1); });
  on.addEventListener("click", () => { stop(); step(1); });
  slider.addEventListener("input", () => { stop(); draw(); });
  controls.addEventListener("input", () => { stop(); clearTimeout(waiting); waiting = setTimeout(compute, 120); });
  window.addEventListener("resize", draw);
  if (addressed) window.addEventListener("hashchange", () => {
    Object.entries(asked()).forEach(([key, value]) => { if (key in inputs) inputs[key].value = value; });
    compute();
  });
  root.classList.add("on");
  const replaced = document.getElementById(root.dataset.replaces || "none");
  if (replaced) replaced.hidden = true;
  compute();
}

window.addEventListener("DOMContentLoaded", () => document.querySelectorAll(".explorer").forEach(fill));
})();
