"""What runs on the page of a trace. It makes no HTML of texts: they become text nodes."""

SCRIPT = r"""
"use strict";
const trace = JSON.parse(document.getElementById("trace").textContent);
const sides = {base: trace.base, controlled: trace.controlled};
const names = Object.keys(sides);
const tip = document.getElementById("tip");
let objective = 0;
// NaN where nothing is known.
function rewardOf(token, k) { return token.reward_so_far[k] ?? NaN; }
function criticOf(token, k) { return token.critic[k] ?? NaN; }
const measures = {
  kl: {label: "KL", of: (t) => t.kl, diverging: false},
  before: {label: "V before", of: (t) => t.value_before[objective], diverging: true, among: valuesOf},
  after: {label: "V after", of: (t) => t.value_after[objective], diverging: true, among: valuesOf},
  change: {label: "Change of V", of: (t) => t.value_after[objective] - t.value_before[objective], diverging: true,
    middle: 0},
  edit: {label: "Length of the edit", of: (t) => t.edit, diverging: false},
};
const criticsOf = trace.objectives.map((_, k) => all((t) => criticOf(t, k)).length > 0);
if (criticsOf.some(Boolean)) {
  measures.critic = {label: "Critic", of: (t) => criticOf(t, objective), diverging: true, among: valuesOf};
}
trace.rewards.forEach((name, k) => {
  const label = trace.rewards.length > 1 ? `Reward so far, ${name}` : "Reward so far";
  measures[`reward${k}`] = {label: label, of: (t) => rewardOf(t, k), diverging: true};
});
let measure = "kl";

function number(value) {
  if (!Number.isFinite(value)) return "-";
  const size = Math.abs(value);
  if (size !== 0 && (size < 0.001 || size >= 100000)) return value.toExponential(1);
  return String(Number(value.toPrecision(3)));
}
function made(tag, classes, text) {
  const element = document.createElement(tag);
  if (classes) element.className = classes;
  if (text !== undefined) element.textContent = text;
  return element;
}
// Ends of lines and blanks as signs, where a token is shown alone.
function shown(text) {
  return text === "" ? "(part of a character)" : text.replaceAll("\n", "\u21b5").replaceAll("\t", "\u21e5")
    .replace(/^ | $/g, "\u2423");
}
function all(of) { return names.flatMap((name) => sides[name].tokens.map(of)).filter(Number.isFinite); }
// Before and after are coloured alike, and the critic, so that they can be compared.
function valuesOf() {
  return [...all((t) => t.value_before[objective]), ...all((t) => t.value_after[objective]),
    ...all((t) => criticOf(t, objective))];
}
function scale() {
  const {of, diverging, middle, among} = measures[measure];
  const values = among ? among() : all(of);
  if (!values.length) return {least: 0, most: 0, middle: 0, reach: 0};
  const [least, most] = [Math.min(...values), Math.max(...values)];
  if (!diverging) return {least: 0, most: most, middle: 0, reach: most};
  const center = middle === undefined ? (least + most) / 2 : middle;
  const reach = Math.max(most - center, center - least);
  return {least: center - reach, most: center + reach, middle: center, reach: reach};
}
function colour(value, {middle, reach}) {
  if (!Number.isFinite(value)) return "";
  const share = reach ? (value - middle) / reach : 0;
  return `rgba(var(--${share < 0 ? "low" : "high"}),calc(${Math.abs(share).toFixed(3)} * var(--opacity)))`;
}

const spans = {};
const parting = (() => {
  const [ours, theirs] = names.map((name) => sides[name].tokens.map((t) => t.drawn.id));
  for (let i = 0; i < Math.max(ours.length, theirs.length); i++) if (ours[i] !== theirs[i]) return i;
  return -1;
})();
function otherDraw(name, token) { return name === "base" ? token.controlled_draw : token.base_draw; }
for (const name of names) {
  const place = document.getElementById(name);
  place.textContent = "";
  spans[name] = sides[name].tokens.map((token, i) => {
    const span = made("span", "token");
    const text = token.drawn.text;
    const isSign = text !== "" && !text.trim();
    if (text === "") { span.textContent = "\u00b7"; span.classList.add("none"); }
    else if (isSign && !text.includes(" ")) { span.append(made("span", "note", shown(text)), text); }
    else span.textContent = text;
    if (otherDraw(name, token).id !== token.drawn.id) span.classList.add("other");
    if (i === parting) span.classList.add("parts");
    span.tabIndex = i ? -1 : 0;
    span.addEventListener("mouseenter", () => tell(name, i));
    span.addEventListener("mouseleave", hide);
    span.addEventListener("focus", () => tell(name, i));
    span.addEventListener("blur", hide);
    span.addEventListener("click", () => span.focus());
    place.append(span);
    return span;
  });
  place.addEventListener("keydown", (event) => {
    const here = spans[name].indexOf(document.activeElement);
    if (here < 0) return;
    if (event.key === "Escape") { hide(); return; }
    const moves = {ArrowRight: here + 1, ArrowLeft: here - 1, Home: 0, End: spans[name].length - 1};
    const next = spans[name][moves[event.key]];
    if (!next) return;
    spans[name][here].tabIndex = -1;
    next.tabIndex = 0;
    next.focus();
    event.preventDefault();
  });
}

function fact(list, label, text) { list.append(made("dt", "", label), made("dd", "", text)); }
function cell(text, classes) { return made("td", classes, text); }
function tell(name, i) {
  hide();
  const token = sides[name].tokens[i];
  const head = made("div");
  head.append(made("span", "word", shown(token.drawn.text)), made("span", "note",
    `  token ${i + 1}, id ${token.drawn.id}`));
  const list = made("dl");
  trace.objectives.forEach((label, k) => {
    const change = token.value_after[k] - token.value_before[k];
    fact(list, trace.objectives.length > 1 ? `V, ${label}` : label === "V" ? "V" : `V (${label})`,
      `${number(token.value_before[k])} \u2192 ${number(token.value_after[k])}`
      + ` (${change < 0 ? "" : "+"}${number(change)})`);
    if (criticsOf[k]) {
      fact(list, trace.objectives.length > 1 ? `Critic, ${label}` : "Critic", number(criticOf(token, k)));
    }
  });
  fact(list, "Edit", `${number(token.edit)}, ${number(100 * token.edit_relative)} % of the state`);
  const spent = name === "base" ? "it would be so far" : "spent so far";
  fact(list, "KL", `${number(token.kl)} nats, ${number(token.nats)} ${spent}`);
  trace.rewards.forEach((label, k) => {
    fact(list, `Reward so far, ${label}`, number(rewardOf(token, k)));
  });
  const other = otherDraw(name, token);
  fact(list, name === "base" ? "Control draws" : "The base draws",
    other.id === token.drawn.id ? "the same" : shown(other.text));
  fact(list, "Time", `${number(1000 * token.seconds)} ms`);
  const table = made("table");
  const titles = made("tr");
  for (const title of ["", ...names, ""]) titles.append(made("th", title, title));
  table.append(titles);
  for (const each of token.alternatives) {
    const row = made("tr", each.id === token.drawn.id ? "drawn" : "");
    const bars = cell("");
    for (const policy of names) {
      const bar = made("div", `share ${policy}`);
      bar.style.width = `${Math.max(each[policy] * 6, 0.06)}rem`;
      bars.append(bar);
    }
    const percent = (share) => `${(100 * share).toFixed(share < 0.0995 ? 2 : 1)} %`;
    row.append(cell(shown(each.text), "word"), cell(percent(each.base), "number"),
      cell(percent(each.controlled), "number"), bars);
    table.append(row);
  }
  tip.replaceChildren(head, list, table);
  tip.hidden = false;
  const span = spans[name][i];
  span.setAttribute("aria-describedby", "tip");
  span.classList.add("near");
  for (const mark of marks) mark.at(name, i);
  // Below the token, or above it where there is more room, and never beyond the page.
  const boxes = span.getClientRects();
  const box = boxes[0] || span.getBoundingClientRect();
  const last = boxes[boxes.length - 1] || box;
  const width = document.documentElement.clientWidth;
  const left = Math.max(8, Math.min(box.left, width - tip.offsetWidth - 8));
  const below = window.innerHeight - last.bottom;
  const top = below < tip.offsetHeight + 12 && box.top > below ? box.top - tip.offsetHeight - 8 : last.bottom + 8;
  tip.style.left = `${left + window.scrollX}px`;
  tip.style.top = `${Math.max(top, 8 - window.scrollY) + window.scrollY}px`;
}
function hide() {
  if (tip.hidden) return;
  tip.hidden = true;
  for (const name of names) {
    for (const span of spans[name]) { span.removeAttribute("aria-describedby"); span.classList.remove("near"); }
  }
  for (const mark of marks) mark.off();
}

// Lines over the tokens of a response, and a mark where the pointer is.
const marks = [];
function drawing(tag, attributes) {
  const element = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
  return element;
}
function plot(name, title, lines, low, high) {
  const [width, height] = [600, 110];
  const count = Math.max(...names.map((each) => sides[each].tokens.length), 2);
  const x = (i) => 4 + (width - 8) * (i / (count - 1));
  const y = (v) => height - 4 - (height - 8) * (high > low ? (v - low) / (high - low) : 0.5);
  const svg = drawing("svg", {viewBox: `0 0 ${width} ${height}`, preserveAspectRatio: "none", role: "img",
    "aria-label": title});
  for (const level of [low, high]) {
    svg.append(drawing("line", {x1: 0, x2: width, y1: y(level), y2: y(level), stroke: "var(--line)"}));
  }
  for (const {values, stroke, dashes} of lines) {
    const points = values.map((v, i) => [x(i), y(v)]).filter(([, v]) => Number.isFinite(v));
    svg.append(drawing("polyline", {points: points.map((p) => p.map((v) => v.toFixed(1)).join(",")).join(" "),
      fill: "none", stroke: stroke, "stroke-width": 1.8, "stroke-dasharray": dashes || "none"}));
  }
  const mark = drawing("line", {y1: 4, y2: height - 4, stroke: "var(--mark)", visibility: "hidden"});
  svg.append(mark);
  marks.push({
    at(where, i) {
      if (where !== name) return;
      for (const end of ["x1", "x2"]) mark.setAttribute(end, x(i));
      mark.setAttribute("visibility", "visible");
    },
    off() { mark.setAttribute("visibility", "hidden"); },
  });
  const levels = made("div", "levels");
  levels.append(made("span", "", number(high)), made("span", "", number(low)));
  const box = made("div", "plot");
  box.append(levels, svg);
  const figure = made("figure");
  figure.append(made("figcaption", "", title), box);
  return figure;
}
function plots() {
  marks.length = 0;
  const nats = [0, Math.max(...all((t) => t.nats), 0)];
  const values = valuesOf();
  for (const name of names) {
    const tokens = sides[name].tokens;
    const place = document.getElementById(`${name}-plots`);
    place.textContent = "";
    if (!tokens.length) continue;
    place.append(
      plot(name, name === "base" ? "Nats that control would have spent so far" : "Nats spent so far",
        [{values: tokens.map((t) => t.nats), stroke: "rgb(var(--high))"}], ...nats),
      plot(name, `V before the edit (dashed) and after it${criticsOf[objective] ? ", and the critic (dotted)" : ""}`,
        [{values: tokens.map((t) => t.value_before[objective]), stroke: "var(--dim)", dashes: "4 3"},
          {values: tokens.map((t) => t.value_after[objective]), stroke: "rgb(var(--high))"},
          ...(criticsOf[objective]
            ? [{values: tokens.map((t) => criticOf(t, objective)), stroke: "rgb(var(--low))", dashes: "2 3"}] : [])],
        Math.min(...values), Math.max(...values)),
      ...trace.rewards.map((label, k) => {
        const rewards = all((t) => rewardOf(t, k));
        const ends = rewards.length ? [Math.min(...rewards), Math.max(...rewards)] : [0, 0];
        return plot(name, `Reward of the response so far, ${label}`,
          [{values: tokens.map((t) => rewardOf(t, k)), stroke: "rgb(var(--high))"}], ...ends);
      }));
  }
}

function paint() {
  const about = scale();
  for (const name of names) {
    sides[name].tokens.forEach((token, i) => {
      spans[name][i].style.backgroundColor = colour(measures[measure].of(token), about);
    });
  }
  document.getElementById("least").textContent = number(about.least);
  document.getElementById("most").textContent = number(about.most);
  const ends = [about.least, about.middle, about.most].map((value) => colour(value, about));
  document.getElementById("scale").style.background = `linear-gradient(to right,${ends.join(",")})`;
}
const place = document.getElementById("measures");
for (const [key, {label}] of Object.entries(measures)) {
  const choice = made("label");
  const radio = made("input");
  radio.type = "radio";
  radio.name = "measure";
  radio.value = key;
  radio.checked = key === measure;
  radio.addEventListener("change", () => { measure = key; paint(); });
  choice.append(radio, label);
  place.append(choice);
}
const select = document.getElementById("objective");
trace.objectives.forEach((label, k) => {
  const option = made("option", "", label);
  option.value = String(k);
  select.append(option);
});
select.addEventListener("change", () => { objective = Number(select.value); plots(); paint(); });
document.getElementById("of").hidden = trace.objectives.length < 2;
document.getElementById("tool").hidden = false;
plots();
paint();
"""
