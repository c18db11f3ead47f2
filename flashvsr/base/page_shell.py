"""What every page looks like and how it moves: style sheet, script and the frame around its parts."""

STYLE = """:root { color-scheme: light dark; --ink: #1d2329; --soft: #5b6672; --paper: #fff; --line: #d9dee3;
  --band: #f4f6f8; --best: #0a6b3d; --bestband: #e3f4ea; --mark: #e5484d; }
@media (prefers-color-scheme: dark) { :root { --ink: #e4e8ec; --soft: #9aa5b1; --paper: #14181c;
  --line: #303840; --band: #1c2228; --best: #7fdcaa; --bestband: #17392a; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 2rem 1.25rem 4rem; max-width: 1400px;
  color: var(--ink); background: var(--paper);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; }
h1 { font-size: 1.8rem; line-height: 1.2; margin: 0 0 1.25rem; }
h2 { font-size: 1.3rem; margin: 2.5rem 0 .75rem; padding-top: .75rem; border-top: 1px solid var(--line); }
h3 { font-size: 1.05rem; margin: 1.75rem 0 .5rem; }
p { max-width: 46rem; margin: .6rem 0; }
code { font: .9em ui-monospace, Menlo, Consolas, monospace; background: var(--band); padding: .1em .3em;
  border-radius: 4px; overflow-wrap: anywhere; }
.scroll { overflow-x: auto; margin: 1rem 0; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .4rem .9rem; text-align: left; border-bottom: 1px solid var(--line); white-space: nowrap; }
th { color: var(--soft); font-weight: 600; font-size: .875rem; }
.num { text-align: right; }
tbody tr:hover { background: var(--band); }
td.best { color: var(--best); background: var(--bestband); font-weight: 700; }
td u { text-decoration: underline; text-underline-offset: .2em; }
td small { display: block; color: var(--soft); font-weight: 400; font-size: .75rem; line-height: 1.2; }
.protocol { color: var(--soft); font-size: .8125rem; line-height: 1.45; margin: -.4rem 0 1rem;
  max-width: 60rem; }
details { margin: .5rem 0; border-left: 2px solid var(--line); padding-left: .9rem; }
summary { cursor: pointer; padding: .25rem 0; font-weight: 600; }
figure { margin: 1rem 0; min-width: 0; }
figcaption { color: var(--soft); font-size: .875rem; margin: .35rem 0; }
img { display: block; max-width: 100%; height: auto; border-radius: 4px; }
.compare { display: grid; gap: .75rem; grid-template-columns: repeat(var(--n), minmax(0, 1fr)); }
.compare figure { margin: 0; }
.compare figcaption { color: var(--ink); font-weight: 600; overflow-wrap: anywhere; }
.compare img { width: 100%; image-rendering: pixelated; cursor: zoom-in; }
.compare .whole { position: relative; margin-bottom: .5rem; }
.compare .whole img { image-rendering: auto; }
.compare .whole i { position: absolute; border: 2px solid var(--mark); border-radius: 2px;
  pointer-events: none; }
.gallery { display: grid; gap: .75rem; grid-template-columns: repeat(auto-fill, minmax(230px, 1fr)); }
.gallery figure { margin: 0; }
.gallery figcaption { overflow-wrap: anywhere; line-height: 1.35; }
.gallery img { width: 100%; }
.panels { display: grid; gap: 1rem 2rem; grid-template-columns: repeat(auto-fill, minmax(280px, 1fr)); }
.panels figure { margin: 0; }
.panels figcaption { color: var(--ink); font-weight: 600; }
.bars svg { width: 100%; overflow: visible; border-bottom: 0; }
.bars rect { fill: #4b8bbe; }
.bars line { stroke: var(--mark); stroke-width: 1.5; }
.bars text { fill: var(--soft); font-size: 10px; }
.charts { display: grid; gap: 1rem 1.5rem;
  grid-template-columns: repeat(auto-fill, minmax(min(100%, 380px), 1fr)); }
.charts figure, .wide { margin: 0; max-width: 46rem; }
.chart { width: 100%; height: auto; display: block; overflow: visible; }
.chart text { fill: var(--soft); font-size: 11.5px; }
.chart .label { fill: var(--ink); }
.chart .grid { stroke: var(--line); stroke-width: 1; }
.chart polyline { fill: none; stroke: var(--c); stroke-width: 1.7; stroke-linejoin: round; }
.chart g > line { stroke: var(--c); stroke-width: 1.7; opacity: .55; }
.chart g > text { fill: var(--ink); }
.mark { fill: var(--c); fill-opacity: .9; }
.legend { display: flex; flex-wrap: wrap; gap: .2rem 1.1rem; font-size: .875rem; margin: .4rem 0; }
.legend span { display: inline-flex; align-items: center; gap: .35rem; }
.legend svg { width: 12px; height: 12px; }
.s0 { --c: #3b82c4; } .s1 { --c: #e07b1a; } .s2 { --c: #2a9d6a; } .s3 { --c: #c94c6e; }
.s4 { --c: #8a63c9; } .s5 { --c: #8c6d46; } .s6 { --c: #2aa5b5; } .s7 { --c: #8a8f98; }
#big { position: fixed; inset: 0; display: none; place-items: center; background: #000d; cursor: zoom-out; }
#big.open { display: grid; }
#big img { width: 96vw; height: 88vh; object-fit: contain; image-rendering: pixelated; }
#big b { color: #fff; }
.viewer { margin: 1rem 0; border-radius: 6px; }
.viewer:focus, .viewer:focus-within { outline: 2px solid var(--line); outline-offset: 6px; }
.viewer .bar { display: flex; flex-wrap: wrap; gap: .35rem 1rem; align-items: center; margin-bottom: .5rem; }
.viewer .bar span { display: inline-flex; flex-wrap: wrap; gap: .25rem; align-items: center; }
.viewer button { font: inherit; font-size: .875rem; color: var(--ink); background: var(--band);
  cursor: pointer; border: 1px solid var(--line); border-radius: 4px; padding: .15rem .6rem;
  min-height: 2rem; }
.viewer button.on { border-color: var(--best); color: var(--best); font-weight: 700; }
.viewer output { min-width: 3.2rem; text-align: center; font-size: .875rem;
  font-variant-numeric: tabular-nums; }
.viewer .panes { display: grid; gap: .5rem .75rem; grid-template-columns: repeat(var(--n), minmax(0, 1fr)); }
.viewer figure { margin: 0; }
.viewer figcaption { margin: 0 0 .2rem; }
.viewer figcaption button { border: 0; background: none; padding: 0; font-weight: 600;
  overflow-wrap: anywhere; text-align: left; min-height: 1.6rem; }
.viewer .pane { position: relative; overflow: hidden; aspect-ratio: var(--ratio); border-radius: 4px;
  background: #000; cursor: grab; user-select: none; }
.viewer:focus .pane, .viewer:focus-within .pane { touch-action: none; }
.viewer .pane img { position: absolute; inset: 0; width: 100%; height: 100%; max-width: none;
  border-radius: 0; image-rendering: pixelated; pointer-events: none; transform-origin: 0 0;
  transform: scale(var(--z)) translate(calc(-1 * var(--x)), calc(-1 * var(--y))); }
.viewer .pane img.off { visibility: hidden; }
.viewer.solo .panes { grid-template-columns: minmax(0, 1fr); }
.viewer.solo figure:not(.alone) { display: none; }
@media (max-width: 800px) {
  .compare { grid-template-columns: repeat(min(var(--n), 2), minmax(0, 1fr)); }
  body { padding: 1.25rem .75rem 3rem; }
  th, td { padding: .35rem .55rem; }
  .viewer .panes { grid-template-columns: repeat(min(var(--n), 2), minmax(0, 1fr)); }
  .viewer.strips .panes { grid-template-columns: minmax(0, 1fr); }
}
"""

SCRIPT = """// A click enlarges a picture; the arrow keys go through its row, in place.
const big = document.getElementById("big");
let row = [], at = 0;
function show(i) {
  at = (i + row.length) % row.length;
  big.querySelector("img").src = row[at].src;
  big.querySelector("b").textContent = row[at].alt;
}
document.querySelectorAll(".compare img").forEach(img => img.addEventListener("click", () => {
  const kind = img.closest(".whole") ? ".whole img" : ".zoom img";
  row = [...img.closest(".compare").querySelectorAll(kind)];
  big.classList.add("open"); show(row.indexOf(img));
}));
big.addEventListener("click", () => big.classList.remove("open"));
document.addEventListener("keydown", e => {
  if (!big.classList.contains("open")) return;
  if (e.key === "Escape") big.classList.remove("open");
  if (e.key === "ArrowRight") show(at + 1);
  if (e.key === "ArrowLeft") show(at - 1);
});

// A viewer shows the same place of all its pictures: z is the zoom, (x, y) the top left corner of what is
// seen, in parts of the picture. One set of style variables moves all panes.
document.querySelectorAll(".viewer").forEach(viewer => {
  const panes = [...viewer.querySelectorAll(".pane")], figures = [...viewer.querySelectorAll("figure")];
  const images = [...viewer.querySelectorAll(".pane img")];
  const choices = [...viewer.querySelectorAll("[data-choice]")];
  const start = viewer.dataset.view.split(" ").map(Number);
  let [z, x, y] = start, choice = 0;
  const within = v => Math.min(Math.max(v, 0), 1 - 1 / z);
  function look(newZ, newX, newY) {
    z = Math.min(Math.max(newZ, 1), 64); x = within(newX); y = within(newY);
    viewer.style.setProperty("--z", z);
    viewer.style.setProperty("--x", 100 * x + "%");
    viewer.style.setProperty("--y", 100 * y + "%");
    viewer.querySelector("output").textContent = (z < 10 ? z.toFixed(1) : z.toFixed(0)) + "×";
    const shown = panes.find(p => p.clientWidth) || panes[0];
    for (const img of images) // smaller than its pixels a picture is drawn smoothly, larger with hard pixels
      img.style.imageRendering = shown.clientWidth * z < 0.99 * img.naturalWidth ? "auto" : "pixelated";
  }
  // Zooms by `factor`, the point (u, v) of the pane staying where it is.
  function zoom(factor, u = 0.5, v = 0.5) {
    const to = Math.min(Math.max(z * factor, 1), 64);
    look(to, x + u * (1 / z - 1 / to), y + v * (1 / z - 1 / to));
  }
  function choose(i) {
    choice = (i + panes[0].children.length) % panes[0].children.length;
    choices.forEach((b, k) => { b.classList.toggle("on", k === choice); b.ariaPressed = k === choice; });
    panes.forEach(p => [...p.children].forEach((img, k) => img.classList.toggle("off", k !== choice)));
  }
  function alone(i) { // one pane at full width; the same again shows all
    const off = i < 0 || figures[i].classList.contains("alone");
    figures.forEach((f, k) => f.classList.toggle("alone", !off && k === i));
    viewer.classList.toggle("solo", !off);
    look(z, x, y);
  }
  const actions = { "in": () => zoom(1.5), "out": () => zoom(1 / 1.5), "whole": () => look(1, 0, 0),
    "detail": () => look(...start) };
  const onClick = (buttons, act) => buttons.forEach((b, i) => b.addEventListener("click", () => act(i, b)));
  onClick(viewer.querySelectorAll("[data-do]"), (i, b) => actions[b.dataset.do]());
  onClick(choices, choose);
  onClick(viewer.querySelectorAll("figcaption button"), alone);
  const keys = { "+": actions.in, "=": actions.in, "-": actions.out, "0": actions.whole, "d": actions.detail,
    ".": () => choose(choice + 1), ",": () => choose(choice - 1), "Escape": () => alone(-1),
    "ArrowLeft": () => look(z, x - 0.1 / z, y), "ArrowRight": () => look(z, x + 0.1 / z, y),
    "ArrowUp": () => look(z, x, y - 0.1 / z), "ArrowDown": () => look(z, x, y + 0.1 / z) };
  viewer.addEventListener("keydown", e => {
    if (e.ctrlKey || e.metaKey || e.altKey) return;
    const digit = Number(e.key) - 1;
    if (digit >= 0 && digit < figures.length) alone(digit);
    else if (keys[e.key]) keys[e.key]();
    else return;
    e.preventDefault();
  });
  const active = () => viewer.contains(document.activeElement);
  const inside = (pane, e) => {
    const box = pane.getBoundingClientRect();
    return [(e.clientX - box.left) / box.width, (e.clientY - box.top) / box.height];
  };
  const fingers = new Map();
  panes.forEach(pane => {
    // The page scrolls under the wheel and the finger until the viewer has been clicked.
    pane.addEventListener("wheel", e => {
      if (!active() && !e.ctrlKey) return;
      e.preventDefault();
      zoom(Math.exp(-e.deltaY / 300), ...inside(pane, e));
    }, { passive: false });
    pane.addEventListener("click", () => viewer.focus({ preventScroll: true }));
    pane.addEventListener("dblclick", e => zoom(z > 1.01 ? 1 / z : 4, ...inside(pane, e)));
    pane.addEventListener("pointerdown", e => {
      if (e.pointerType !== "mouse" && !active()) return;
      pane.setPointerCapture(e.pointerId);
      fingers.set(e.pointerId, inside(pane, e));
    });
    pane.addEventListener("pointermove", e => {
      if (!fingers.has(e.pointerId)) return;
      const before = [...fingers.values()], old = fingers.get(e.pointerId), now = inside(pane, e);
      fingers.set(e.pointerId, now);
      const after = [...fingers.values()];
      if (after.length === 2) {
        const apart = ([a, b]) => Math.hypot(a[0] - b[0], a[1] - b[1]);
        zoom(apart(after) / Math.max(apart(before), 1e-6), (before[0][0] + before[1][0]) / 2,
          (before[0][1] + before[1][1]) / 2);
      }
      look(z, x - (now[0] - old[0]) / z / after.length, y - (now[1] - old[1]) / z / after.length);
    });
    for (const end of ["pointerup", "pointercancel"])
      pane.addEventListener(end, e => fingers.delete(e.pointerId));
  });
  window.addEventListener("resize", () => look(z, x, y));
  choose(0);
  look(...start);
});
"""

SHELL = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{{ title }}</title>
<style>
{{ style }}</style>
</head>
<body>
<h1>{{ title }}</h1>
{% for part in parts %}{{ part }}
{% endfor %}
<div id="big"><b></b><img alt=""></div>
<script>
{{ script }}</script>
</body>
</html>
"""

VIEWER = """<div class="viewer{{ " strips" if strips }}" tabindex="0" data-view="{{ view }}"
 style="--n: {{ columns }}; --ratio: {{ ratio }}; --z: {{ zoom }}; --x: {{ x }}%; --y: {{ y }}%">
<div class="bar">{% if choices|length > 1 %}<span>{% for label, _ in choices -%}
<button data-choice{% if loop.first %} class="on"{% endif %}>{{ label }}</button>{% endfor %}</span>
{%- endif -%}
<span><button data-do="out" aria-label="smaller">−</button><output></output>
<button data-do="in" aria-label="larger">+</button><button data-do="whole">whole</button>
{%- if crop %}<button data-do="detail">detail</button>{% endif %}</span></div>
<div class="panes">{% for name in names %}<figure><figcaption><button>{{ name }}</button></figcaption>
<div class="pane">{% for label, pictures in choices -%}
<img{% if not loop.first %} class="off"{% endif %} src="{{ pictures[name].uri }}"
 alt="{{ name }}, {{ label }}" draggable="false">{% endfor %}</div></figure>{% endfor %}</div></div>"""
