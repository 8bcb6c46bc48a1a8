"use strict";

// --- sortable tables: a click sorts, the next one turns the order round ---------------------------------

for (const table of document.querySelectorAll("table.sortable")) {
  const heads = [...table.tHead.rows[0].cells];
  heads.forEach((head, column) => head.querySelector("button").addEventListener("click", () => {
    const numeric = head.classList.contains("number");
    const before = head.getAttribute("aria-sort");
    const direction = before ? (before === "ascending" ? "descending" : "ascending") : numeric ? "descending" : "ascending";
    heads.forEach((other) => other.removeAttribute("aria-sort"));
    head.setAttribute("aria-sort", direction);
    const sign = direction === "ascending" ? 1 : -1;
    const value = (row) => row.cells[column].dataset.value;
    const order = (a, b) => {
      const [x, y] = [value(a), value(b)];
      if (x === "" || y === "") return (x === "") - (y === "");  // empty ones last, either way round
      return sign * (numeric ? x - y : x.localeCompare(y, undefined, { numeric: true }));
    };
    table.tBodies[0].append(...[...table.tBodies[0].rows].sort(order));
  }));
}

// --- the image browser ------------------------------------------------------------------------------------

const data = JSON.parse(document.getElementById("data").textContent);
const at = (id) => document.getElementById(id);
const PAGE = 24, EXTREMES = 3;
const state = { set: data.sets[0], order: "number", shown: PAGE, matching: [], open: null };

// Text goes into the page as text only.
function make(tag, attributes = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  node.append(...children);
  return node;
}

function fill(select, options, chosen) {
  select.replaceChildren(...options.map(([value, text]) => make("option", { value }, text)));
  if (chosen !== undefined) select.value = chosen;
}

function format(score, sign = false) {
  const text = Math.abs(score) >= 10 ? score.toFixed(2) : score.toFixed(3);
  return (sign && score > 0 ? "+" : "") + text.replace("-", "−");
}

const nameOf = (prompt) => `${prompt.category} ${prompt.key.split("/").at(-1)}`;
const scorer = () => Number(at("scorer").value);
const model = () => Number(at("model").value);
const against = () => Number(at("against").value);
const change = (prompt) => prompt.scores[scorer()][model()] - prompt.scores[scorer()][against()];

function chooseSet() {
  const set = state.set = data.sets[Number(at("set").value)];
  const baseline = set.models.indexOf(set.baseline);
  const last = set.models.length - 1;
  const categories = [...new Set(set.prompts.map((prompt) => prompt.category))];
  fill(at("category"), [["", `all (${set.prompts.length})`], ...categories.map((name) => [name,
    `${name || "none"} (${set.prompts.filter((prompt) => prompt.category === name).length})`])]);
  fill(at("scorer"), set.scorers.map((name, i) => [i, name]));
  fill(at("model"), set.models.map((name, i) => [i, name]), last === baseline ? 0 : last);
  fill(at("against"), set.models.map((name, i) => [i, name]), baseline);
  at("cards").style.setProperty("--card", `${Math.min(60, Math.max(20, 8 * set.models.length))}rem`);
  show();
}

function show() {
  state.shown = PAGE;
  const category = at("category").value, words = at("search").value.toLowerCase().split(/\s+/).filter(Boolean);
  const matching = state.set.prompts.filter((prompt) =>
    (!category || prompt.category === category) &&
    words.every((word) => prompt.text.toLowerCase().includes(word)));
  const ranked = [...matching].sort((a, b) => change(b) - change(a));
  state.matching = { number: matching, best: ranked, worst: [...ranked].reverse() }[state.order];
  const comparing = model() !== against();
  at("extremes").hidden = !comparing || matching.length < 2;
  const count = Math.min(EXTREMES, Math.floor(matching.length / 2));
  at("best").replaceChildren(...ranked.slice(0, count).map((prompt) => card(prompt, true)));
  at("worst").replaceChildren(...ranked.slice(ranked.length - count).reverse().map((prompt) => card(prompt, true)));
  at("cards").replaceChildren();
  showMore(0);
}

function showMore(from) {
  at("cards").append(...state.matching.slice(from, state.shown).map((prompt) => card(prompt, false)));
  const shown = Math.min(state.shown, state.matching.length);
  at("count").textContent = `${shown} of ${state.matching.length} prompts`;
  at("more").hidden = shown === state.matching.length;
}

function card(prompt, pairOnly) {
  const header = make("header");
  if (model() !== against()) {
    const gain = change(prompt);
    header.append(make("span", { class: `change ${gain > 0 ? "up" : gain < 0 ? "down" : ""}` }, format(gain, true)));
  }
  header.append(make("p", { class: "text" }, prompt.text || "(empty prompt)"),
    make("span", { class: "tag" }, nameOf(prompt)));
  const models = pairOnly ? [against(), model()] : state.set.models.map((_, i) => i);
  const strip = make("div", { class: "strip" }, ...models.map((i) => picture(prompt, i, models, 0, true)));
  return make("article", { class: "card", "data-key": prompt.key, "data-category": prompt.category }, header, strip);
}

function picture(prompt, i, models, repeat, small) {
  const scores = prompt.scores[scorer()], top = Math.max(...models.map((m) => scores[m]));
  const image = imageOf(prompt, i, repeat, small);
  const inside = small ? make("button", { type: "button", "aria-label": `Enlarge: ${state.set.models[i]}` }, image) : image;
  if (small) inside.addEventListener("click", () => openViewer(prompt));
  const caption = make("figcaption", {}, make("i", { style: `background:${state.set.colours[i]}` }),
    `${state.set.models[i]} `, make("b", {}, format(scores[i])));
  const figure = make("figure", { style: `--frame:${state.set.colours[i]}` }, inside, caption);
  if (scores[i] === top && models.length > 1) figure.className = "winner";
  return figure;
}

// The embedded copy where there is one; the file itself when enlarged. Each stands in for the other.
function imageOf(prompt, i, repeat, small) {
  const [number, link] = prompt.images[i][repeat] ?? [-1, ""];
  const embedded = data.embedded[number];
  const sources = (small ? [embedded, link] : [link, embedded]).filter(Boolean);
  if (!sources.length) return make("div", { class: "broken" }, "no image here");
  const image = make("img", { alt: `${state.set.models[i]}: ${prompt.text}`, loading: "lazy", src: sources[0] });
  image.addEventListener("load", () => image.classList.toggle("pixels", image.naturalWidth <= 128));
  image.addEventListener("error", () => {
    sources.shift();
    if (sources.length) image.src = sources[0];
    else image.replaceWith(make("div", { class: "broken" }, `not found: ${link}`));
  });
  return image;
}

// --- one prompt, enlarged -----------------------------------------------------------------------------------

function openViewer(prompt) {
  state.open = prompt;
  const models = state.set.models.map((_, i) => i);
  const repeats = Math.max(...prompt.images.map((images) => images.length), 1);
  at("viewer-text").replaceChildren(make("b", {}, prompt.text || "(empty prompt)"), make("br"),
    `${state.set.name} · ${nameOf(prompt)} · scores by ${state.set.scorers[scorer()]}`);
  const figures = [];
  for (let repeat = 0; repeat < repeats; repeat++)
    for (const i of models) figures.push(picture(prompt, i, models, repeat, false));
  at("viewer-images").replaceChildren(...figures);
  if (!at("viewer").open) at("viewer").showModal();
}

function step(by) {
  const next = state.matching[state.matching.indexOf(state.open) + by];
  if (next && state.open) openViewer(next);
}

at("viewer-close").addEventListener("click", () => at("viewer").close());
at("viewer-previous").addEventListener("click", () => step(-1));
at("viewer-next").addEventListener("click", () => step(1));
at("viewer").addEventListener("click", (event) => event.target === at("viewer") && at("viewer").close());
at("viewer").addEventListener("keydown", (event) => {
  if (event.key === "ArrowLeft") step(-1);
  if (event.key === "ArrowRight") step(1);
});

// --- controls -------------------------------------------------------------------------------------------------

at("controls").addEventListener("submit", (event) => event.preventDefault());
at("set").addEventListener("change", chooseSet);
for (const id of ["category", "scorer", "model", "against"]) at(id).addEventListener("change", show);
at("search").addEventListener("input", show);
at("more").addEventListener("click", () => { state.shown += PAGE; showMore(state.shown - PAGE); });
for (const button of at("order").querySelectorAll("button")) button.addEventListener("click", () => {
  state.order = button.dataset.order;
  at("order").querySelectorAll("button").forEach((other) => other.setAttribute("aria-pressed", other === button));
  show();
});
fill(at("set"), data.sets.map((set, i) => [i, set.name]));
chooseSet();
