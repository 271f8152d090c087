"use strict";
const DATA = JSON.parse(document.getElementById("data").textContent);

/* Charts: colours are names, which the present colour scheme fills in. */
function coloured(value, styles) {
  if (typeof value === "string" && value.startsWith("@")) {
    const name = value.slice(1);
    return styles.getPropertyValue(/^\d$/.test(name) ? `--c${name}` : `--${name}`).trim();
  }
  if (Array.isArray(value)) return value.map((item) => coloured(item, styles));
  if (value && typeof value === "object") {
    return Object.fromEntries(Object.entries(value).map(([k, v]) => [k, coloured(v, styles)]));
  }
  return value;
}
function drawCharts() {
  const styles = getComputedStyle(document.documentElement);
  const options = { responsive: true, displaylogo: false, displayModeBar: false };
  for (const [name, figure] of Object.entries(DATA.figures)) {
    const { data, layout } = coloured(figure, styles);
    document.getElementById(`chart-${name}`).style.height = `${layout.height}px`;
    Plotly.react(`chart-${name}`, data, layout, options);
  }
}
drawCharts();
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", drawCharts);

/* Focus maps: a strip per policy, and the text as the chosen policy reads it. */
const LEVELS = ["token by token", "as a gist", "as a gist of gists", "as a gist of gists of gists"];
const BAR_HEIGHTS = [24, 14, 8, 4];

function make(tag, attributes = {}, parent = null) {
  const svg = tag === "svg" || tag === "rect";
  const node = svg
    ? document.createElementNS("http://www.w3.org/2000/svg", tag)
    : document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name === "text") node.textContent = value;
    else node.setAttribute(name, value);
  }
  if (parent) parent.append(node);
  return node;
}
function entriesOf(map, context) {
  const entries = [];
  let first = context.first;
  context.lods.forEach((lod, place) => {
    const last = Math.min(first + map.block_size ** lod, map.known);
    const score = context.scores ? context.scores[place] : undefined;
    if (first < last) entries.push({ lod, first, last, score });
    first += map.block_size ** lod;
  });
  return entries;
}
function opened(map, context) {
  const levels = new Array(map.known).fill(-1);
  for (const { lod, first, last } of entriesOf(map, context)) levels.fill(lod, first, last);
  return map.spans.filter(([first, last]) => levels.slice(first, last).every((l) => l === 0));
}
function strip(map, context) {
  const box = { viewBox: `0 0 ${map.known} 26`, preserveAspectRatio: "none" };
  const svg = make("svg", { ...box, "aria-hidden": "true" });
  make("rect", { class: "nothing", x: 0, y: 12.5, width: map.known, height: 1 }, svg);
  let bar = null;
  const flush = () => {
    if (!bar) return;
    const height = BAR_HEIGHTS[bar.lod];
    const [x, width, y] = [bar.first, bar.last - bar.first, 13 - height / 2];
    make("rect", { class: `l${bar.lod}`, x, y, width, height }, svg);
  };
  for (const entry of entriesOf(map, context)) {
    if (bar && bar.lod === entry.lod && bar.last === entry.first) bar.last = entry.last;
    else { flush(); bar = { ...entry }; }
  }
  flush();
  const width = Math.max(2, map.known / 300);
  for (const [first, last] of map.spans) {
    make("rect", { class: "mark", x: (first + last - width) / 2, y: 0, width, height: 26 }, svg);
  }
  return svg;
}
function scoresBefore(map, policy, step) {
  const scores = new Array(map.known).fill(null);
  for (const [round, context] of map.contexts[policy].slice(0, step + 1).entries()) {
    for (const { first, last, score, lod } of entriesOf(map, context)) {
      if (typeof score === "number") scores.fill({ score, lod, round: round + 1 }, first, last);
    }
  }
  return scores;
}
function writeText(box, map, policy, step) {
  box.textContent = "";
  const scores = scoresBefore(map, policy, step);
  const asked = (token) => map.spans.some(([first, last]) => first <= token && token < last);
  const add = (first, last, kind, what) => {
    const text = map.pieces.slice(first, last).join("");
    const node = make("span", { class: kind, text }, box);
    const marked = [...Array(last - first).keys()].some((offset) => asked(first + offset));
    if (marked) node.classList.add("asked");
    const known = scores[first];
    node.dataset.tip = what + (marked ? " · asked for" : "") + (known
      ? ` · LensNet's score ${known.score >= 0 ? "+" : ""}${known.score.toFixed(3)}`
        + ` (round ${known.round}, ${LEVELS[known.lod]})` : "");
    if (known) node.dataset.score = known.score;
  };
  let next = 0;
  for (const { lod, first, last } of entriesOf(map, map.contexts[policy][step])) {
    if (next < first) add(next, first, "nothing", `tokens ${next}–${first - 1}: not read`);
    const tokens = lod ? `tokens ${first}–${last - 1}, one entry` : `token ${first}`;
    add(first, last, `l${lod}`, `${tokens}: read ${LEVELS[lod]}`);
    next = last;
  }
  if (map.pieces.length > map.known) {
    make("span", { class: "next", text: map.pieces.slice(map.known).join("") }, box)
      .dataset.tip = "to be predicted: nobody has read it";
  }
}
function focusMap(root, map) {
  const rows = make("div", { class: "strips" }, root);
  const controls = make("div", { class: "controls" }, root);
  const box = make("div", { class: "text", tabindex: 0, "aria-label": "the text" }, root);
  const buttons = {};
  const show = (policy, step) => {
    for (const [name, button] of Object.entries(buttons)) {
      button.setAttribute("aria-pressed", name === policy);
    }
    const steps = map.contexts[policy].length;
    writeText(box, map, policy, step);
    controls.textContent = "";
    const last = step === steps - 1;
    const found = opened(map, map.contexts[policy][step]).length;
    const score = map.spans.length ? `: ${found} of ${map.spans.length} asked for in full` : "";
    if (steps > 1) {
      const label = make("label", { text: "refocus " }, controls);
      const range = { type: "range", min: 0, max: steps - 1, value: step };
      const input = make("input", { ...range, "aria-label": "round of refocusing" }, label);
      input.addEventListener("input", () => {
        show(policy, Number(input.value));
        controls.querySelector("input").focus();
      });
      const when = step ? `after round ${step} of ${steps - 1}` : "where focus starts";
      make("span", { text: `${policy}, ${last ? "the context that is read" : when}${score}` },
        controls);
    } else {
      make("span", { text: `${policy} chooses once${score}` }, controls);
    }
    buttons[policy].querySelector("svg").replaceWith(strip(map, map.contexts[policy][step]));
    const answer = box.querySelector(".asked");
    box.scrollTop = answer ? Math.max(0, answer.offsetTop - box.offsetTop - 120) : 0;
  };
  for (const [policy, contexts] of Object.entries(map.contexts)) {
    const final = contexts[contexts.length - 1];
    const button = make("button", { class: "strip", type: "button" }, rows);
    const name = make("span", { class: "name", text: policy }, button);
    make("small", { text: DATA.policies[policy] ?? "" }, name);
    button.append(strip(map, final));
    const count = opened(map, final).length;
    const text = map.spans.length ? `${count} of ${map.spans.length}` : "";
    make("span", { class: "count", text }, button);
    buttons[policy] = button;
    button.addEventListener("click", () => show(policy, contexts.length - 1));
  }
  const names = Object.keys(map.contexts);
  const start = names.includes("lens") ? "lens" : names[0];
  show(start, map.contexts[start].length - 1);
}
DATA.maps.forEach((map, number) => focusMap(document.getElementById(`map-${number}`), map));

/* One tooltip, for pointers and for touch. */
const TIP = document.getElementById("tip");
function tip(event) {
  const text = event.target.closest?.("[data-tip]")?.dataset.tip;
  TIP.hidden = !text;
  if (!text) return;
  TIP.textContent = text;
  const left = Math.min(event.clientX + 12, innerWidth - TIP.offsetWidth - 6);
  const below = event.clientY + 18 + TIP.offsetHeight < innerHeight;
  TIP.style.left = `${Math.max(6, left)}px`;
  TIP.style.top = `${below ? event.clientY + 18 : event.clientY - TIP.offsetHeight - 12}px`;
}
addEventListener("pointermove", tip);
addEventListener("click", tip);
addEventListener("scroll", () => { TIP.hidden = true; }, true);
document.documentElement.dataset.drawn = "yes";
