// The explorer: the exact map of infinite width beside a random network drawn in this page.
"use strict";

const INPUTS = 64;

// Infinite width: v^2/sigma^2 and sigma^2 by layer, as svlib.theory.trajectory at He's rule.
// The gap loses (sin t - t cos t)/pi in a layer, cos t = 1 - gap.
function decrement(gap, slope) {
  const t = 2 * Math.asin(Math.sqrt(gap / 2));
  const loss = (Math.sin(t) - t * Math.cos(t)) / Math.PI;
  return loss * (1 - slope) ** 2 / (1 + slope * slope);
}

function theory({ depth, slope, beta, norm }) {
  const fraction = [1], sigma2 = [1];
  const base = decrement(1, slope);
  for (let layer = 1; layer <= depth; layer++) {
    const q = norm ? 1 + beta * layer : (1 + beta) ** layer;
    const share = !beta ? 1 : norm ? beta / q : beta / (1 + beta);
    const gap = fraction[layer - 1];
    fraction.push(gap - share * (norm ? gap - (1 - base) : decrement(gap, slope)));
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

function activated(y, width, slope, norm) {
  const out = new Float32Array(y.length);
  for (let u = 0; u < width; u++) {
    let mean = 0, scale = 1;
    if (norm) { // BatchNorm over the inputs
      let squares = 0;
      for (let a = 0; a < INPUTS; a++) mean += y[u * INPUTS + a] / INPUTS;
      for (let a = 0; a < INPUTS; a++) squares += (y[u * INPUTS + a] - mean) ** 2;
      scale = 1 / Math.sqrt(squares / INPUTS);
    }
    for (let a = 0; a < INPUTS; a++) {
      const z = (y[u * INPUTS + a] - mean) * scale;
      out[u * INPUTS + a] = z > 0 ? z : slope * z;
    }
  }
  return out;
}

// A network: layer 0 is white noise, weights have He's variance for the slope.
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

window.svlibExplorer = { theory, law, simulate: (given) => simulate(given).measured, state: null };

window.addEventListener("DOMContentLoaded", () => {
  const root = document.getElementById("explorer");
  if (!root) return;
  const control = (name) => root.querySelector(`[name=${name}]`);
  const still = window.matchMedia("(prefers-reduced-motion: reduce)");
  let exact, run, given, timer = null, waiting = null;

  const ink = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
  const dark = () => document.documentElement.dataset.theme === "dark";
  const colours = () => dark()
    ? { m: "#f0a35e", v: "#6bb8f0", sigma: "#b5b5b5", ratio: "#5fc9a3" }
    : { m: "#B4500A", v: "#0072B2", sigma: "#666666", ratio: "#007A58" };

  function canvas(id, height) {
    const element = root.querySelector(`#${id}`), box = element.parentElement.clientWidth;
    const sharp = window.devicePixelRatio || 1;
    element.width = box * sharp; element.height = height * sharp;
    element.style.height = `${height}px`;
    const context = element.getContext("2d");
    context.scale(sharp, sharp);
    context.font = "13px sans-serif"; context.fillStyle = ink("--pst-color-text-base") || "#333";
    return { context, box, height };
  }

  function curves() {
    const panels = [
      ["m, v and σ", [["sigma", exact.sigma2.map(Math.sqrt), null, "σ"],
        ["m", exact.fraction.map((g, l) => Math.sqrt(exact.sigma2[l] * (1 - g))), run.measured.map((x) => x.m2 < 0 ? null : Math.sqrt(x.m2)), "m"],
        ["v", exact.fraction.map((g, l) => Math.sqrt(exact.sigma2[l] * g)), run.measured.map((x) => Math.sqrt(x.v2)), "v"]]],
      ["m/v", [["ratio", exact.fraction.map((g) => Math.sqrt((1 - g) / g)), run.measured.map((x) => x.m2 < 0 ? null : Math.sqrt(x.m2 / x.v2)), "infinite width"],
        ...(exact.law ? [["m", exact.law, null, "law of width N"]] : [])]],
    ];
    const { context, box } = canvas("explorer-curves", 420);
    const paint = colours(), text = context.fillStyle, left = 44, right = box - 90;
    panels.forEach(([title, lines], index) => {
      const top = 24 + index * 206, bottom = top + 150, depth = given.depth;
      const all = lines.flatMap(([, line, points]) => [...line, ...(points || [])]).filter((x) => x !== null && isFinite(x));
      const high = Math.max(1, ...all) * 1.05;
      const x = (layer) => left + (right - left) * layer / depth, y = (value) => bottom - (bottom - top) * value / high;
      context.strokeStyle = text; context.lineWidth = 1; context.fillStyle = text;
      context.beginPath(); context.moveTo(left, top); context.lineTo(left, bottom); context.lineTo(right, bottom); context.stroke();
      context.fillText(title, left, top - 8);
      [0, high / 2, high].forEach((value) => context.fillText(value.toPrecision(2), 4, y(value) + 4));
      [0, Math.round(depth / 2), depth].forEach((layer) => context.fillText(String(layer), x(layer) - 6, bottom + 17));
      if (index) context.fillText("layer", (left + right) / 2 + 24, bottom + 17);
      lines.forEach(([name, line, points, label], place) => {
        context.strokeStyle = context.fillStyle = paint[name]; context.lineWidth = 2;
        context.setLineDash(place === 0 ? [] : place === 1 ? [7, 4] : [2, 3]);
        context.beginPath();
        line.forEach((value, layer) => context[layer ? "lineTo" : "moveTo"](x(layer), y(value)));
        context.stroke(); context.setLineDash([]);
        (points || []).forEach((value, layer) => {
          if (value === null) return;
          context.beginPath(); context.arc(x(layer), y(value), 2.6, 0, 7); context.fill();
        });
        const clear = 14 * (index ? 0 : place === 0 ? -1 : place === 1 ? 0.3 : 1);
        context.fillText(label.length > 3 ? label.split(" ")[0] : label, right + 6, y(line[depth]) + 4 + (index ? place * 14 : clear));
      });
      context.strokeStyle = text; context.globalAlpha = 0.5;
      context.beginPath(); context.moveTo(x(shown()), top); context.lineTo(x(shown()), bottom); context.stroke();
      context.globalAlpha = 1;
    });
  }

  const shown = () => Math.min(Number(control("layer").value), given.depth);

  function heat() {
    const { context, box } = canvas("explorer-heat", 250);
    const y = run.layers[shown()], units = Math.min(given.width, 40);
    const { m2, v2 } = run.measured[shown()], scale = Math.sqrt(Math.max(m2, 0) + v2);
    const w = box / INPUTS, h = 250 / units, ground = dark() ? 20 : 250;
    for (let u = 0; u < units; u++) {
      for (let a = 0; a < INPUTS; a++) {
        const x = Math.max(-1, Math.min(1, y[u * INPUTS + a] / scale / 2.5)), strong = Math.abs(x);
        const goal = x > 0 ? (dark() ? [240, 140, 70] : [178, 40, 20]) : (dark() ? [90, 170, 245] : [10, 80, 170]);
        context.fillStyle = `rgb(${goal.map((part) => Math.round(ground + (part - ground) * strong)).join()})`;
        context.fillRect(a * w, u * h, w + 0.5, h + 0.5);
      }
    }
  }

  function ray() {
    const { context, box } = canvas("explorer-ray", 250);
    const { along, across } = plane(run.layers[shown()], given.width);
    const { m2, v2 } = run.measured[shown()], scale = Math.sqrt(given.width * (Math.max(m2, 0) + v2));
    const x = (value) => 20 + (box - 40) * (value / scale + 0.4) / 2.2, y = (value) => 125 - 110 * value / scale;
    context.strokeStyle = context.fillStyle; context.globalAlpha = 0.5;
    context.beginPath(); context.moveTo(20, 125); context.lineTo(box - 20, 125); context.stroke();
    context.globalAlpha = 1;
    context.fillText("0", x(0) - 3, 142); context.fillText("common ray →", box - 110, 244);
    context.fillStyle = colours().v;
    along.forEach((value, a) => { context.beginPath(); context.arc(x(value), y(across[a]), 3, 0, 7); context.fill(); });
  }

  function tell() {
    const at = run.measured[shown()], end = run.measured[given.depth];
    const ratio = (x) => x.m2 > 0 ? Math.sqrt(x.m2 / x.v2).toFixed(2) : "0";
    const infinite = Math.sqrt((1 - exact.fraction[given.depth]) / exact.fraction[given.depth]).toFixed(2);
    root.querySelector("#explorer-layer").textContent = `layer ${shown()}: m/v = ${ratio(at)}`;
    root.querySelector("#explorer-told").textContent =
      `At layer ${given.depth} this network has m/v = ${ratio(end)}; infinite width has ${infinite}.`;
    root.querySelector("#explorer-curves").setAttribute("aria-label",
      `Curves of m, v, sigma and m over v by layer. m over v at layer ${given.depth}: ${ratio(end)} in the network, ${infinite} at infinite width.`);
    root.querySelector("#explorer-heat").setAttribute("aria-label",
      `Heat map of units by inputs at layer ${shown()}: ${at.m2 > 4 * at.v2 ? "every row has nearly one colour" : at.m2 > at.v2 ? "rows begin to show" : "inputs differ along every row"}.`);
    root.querySelector("#explorer-ray").setAttribute("aria-label",
      `The 64 inputs of layer ${shown()} in a plane: ${at.m2 > 4 * at.v2 ? "they lie close to one ray" : "they are spread"}.`);
  }

  function draw() { curves(); heat(); ray(); tell(); }

  function compute() {
    const read = (name) => Number(control(name).value);
    given = { width: read("width"), depth: read("depth"), slope: read("slope"), beta: read("beta"), norm: control("norm").value === "batch", seed: read("seed") };
    ["width", "depth", "slope", "seed"].forEach((name) => { root.querySelector(`#explorer-${name}`).textContent = control(name).value; });
    exact = theory(given);
    exact.law = !given.slope && !given.beta && !given.norm ? law(given, exact.fraction) : null;
    run = simulate(given);
    control("layer").max = given.depth;
    window.svlibExplorer.state = { given, fraction: exact.fraction, sigma2: exact.sigma2, law: exact.law, measured: run.measured };
    draw();
  }

  const play = root.querySelector("#explorer-play");
  function stop() { clearInterval(timer); timer = null; play.textContent = "Play"; play.setAttribute("aria-pressed", "false"); }
  function step(by) {
    control("layer").value = (shown() + by + given.depth + 1) % (given.depth + 1);
    draw();
  }
  play.addEventListener("click", () => {
    if (timer !== null) { stop(); return; }
    if (shown() === given.depth) control("layer").value = 0;
    if (still.matches) { control("layer").value = given.depth; draw(); return; } // no motion: to the end
    play.textContent = "Stop"; play.setAttribute("aria-pressed", "true");
    timer = setInterval(() => { step(1); if (shown() === given.depth) stop(); }, 150);
  });
  root.querySelector("#explorer-back").addEventListener("click", () => { stop(); step(-1); });
  root.querySelector("#explorer-on").addEventListener("click", () => { stop(); step(1); });
  control("layer").addEventListener("input", () => { stop(); draw(); });
  ["width", "depth", "slope", "beta", "norm", "seed"].forEach((name) => {
    control(name).addEventListener("input", () => {
      stop(); clearTimeout(waiting); waiting = setTimeout(compute, 120);
    });
  });
  new MutationObserver(draw).observe(document.documentElement, { attributeFilter: ["data-theme"] });
  window.addEventListener("resize", draw);
  compute();
});
