// --- the image browser: prompts that match the controls, as cards ----------------------------------------------

const data = JSON.parse(document.getElementById("data").textContent);
const at = (id) => document.getElementById(id);
const controls = at("controls").elements;
const PAGE = 24;
const state = { set: data.sets[0], matching: [], first: 0, end: PAGE };

// Text goes into the page as text only.
function make(tag, attributes = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  node.append(...children);
  return node;
}

function fill(select, options, chosen) {
  select.replaceChildren(...options.map(([value, text]) => make("option", { value }, text)));
  select.value = chosen;
}

const named = (names) => names.map((name) => [name, name]);

function format(score, sign = false) {
  if (score === null) return "–";
  const text = Math.abs(score) >= 10 ? score.toFixed(2) : score.toFixed(3);
  return (sign && score > 0 ? "+" : "") + text.replace("-", "−");
}

const nameOf = (prompt) => `${prompt.category} ${prompt.key.split("/").at(-1)}`.trim();
const scorer = () => state.set.scorers.indexOf(controls.metric.value);
const model = () => state.set.models.indexOf(controls.model.value);
const against = () => state.set.models.indexOf(controls.against.value);
const changeBy = (prompt, s) => prompt.scores[s][model()] - prompt.scores[s][against()];
const change = (prompt) => changeBy(prompt, scorer());
const repeatsOf = (prompt) => Math.max(1, ...prompt.images.map((images) => images.length));

// The score of one image of a model, or the prompt's mean over its images; null without one.
function scoreOf(prompt, s, i, repeat = null) {
  if (repeat === null) return prompt.scores[s][i];
  if (!prompt.images[i][repeat]) return null;
  return prompt.each ? prompt.each[s][i][repeat] : prompt.scores[s][i];
}

function metricsDisagree(prompt) {
  const changes = state.set.scorers.map((_, s) => changeBy(prompt, s));
  return changes.some((gain) => gain > 0) && changes.some((gain) => gain < 0);
}

function chooseSet(name) {
  const set = state.set = data.sets.find((each) => each.name === name) ?? data.sets[0];
  const categories = [...new Set(set.prompts.map((prompt) => prompt.category))].filter(Boolean);
  const sizeOf = (category) => set.prompts.filter((prompt) => prompt.category === category).length;
  controls.set.value = set.name;
  fill(controls.category, [["", `all (${set.prompts.length})`],
    ...categories.map((category) => [category, `${category} (${sizeOf(category)})`])], "");
  fill(controls.metric, named(set.scorers), set.scorers[0]);
  fill(controls.model, named(set.models), set.model);
  fill(controls.against, named(set.models), set.baseline);
  at("cards").style.setProperty("--card", `${Math.min(60, Math.max(20, 8 * set.models.length))}rem`);
}

function matches(prompt, words) {
  return (!controls.category.value || prompt.category === controls.category.value)
    && (controls.only.value !== "disagree" || metricsDisagree(prompt))
    && words.every((word) => prompt.text.toLowerCase().includes(word));
}

function show() {
  const words = controls.find.value.toLowerCase().split(/\s+/).filter(Boolean);
  const matching = state.set.prompts.filter((prompt) => matches(prompt, words));
  const ranked = [...matching].sort((a, b) => change(b) - change(a));
  state.matching = { number: matching, best: ranked, worst: [...ranked].reverse() }[controls.order.value];
  const compared = `${controls.model.value} against ${controls.against.value} by ${controls.metric.value}`;
  document.querySelectorAll(".comparison").forEach((node) => { node.textContent = compared; });
  showExtremes(ranked);
  showFrom(0);
}

function showExtremes(ranked) {
  const count = Math.min(data.extremes, Math.floor(ranked.length / 2));
  at("extremes").hidden = model() === against() || !count;
  at("best").replaceChildren(...ranked.slice(0, count).map((prompt) => card(prompt, true)));
  at("worst").replaceChildren(...ranked.slice(ranked.length - count).reverse().map((prompt) => card(prompt, true)));
}

function showFrom(first) {
  [state.first, state.end] = [first, first];
  at("cards").replaceChildren();
  showMore();
}

function showMore() {
  const end = Math.min(state.end + PAGE, state.matching.length);
  at("cards").append(...state.matching.slice(state.end, end).map((prompt) => card(prompt, false)));
  state.end = end;
  countShown();
}

function showEarlier() {
  const first = Math.max(0, state.first - PAGE);
  at("cards").prepend(...state.matching.slice(first, state.first).map((prompt) => card(prompt, false)));
  state.first = first;
  countShown();
}

function countShown() {
  const total = state.matching.length;
  const shown = state.first ? `${state.first + 1}–${state.end}` : state.end;
  at("count").textContent = `${shown} of ${total} prompts`;
  at("earlier").hidden = state.first === 0;
  at("more").hidden = state.end === total;
}

// Show the prompt of a number, such as 12, or "anime 12" where styles have numbers of their own.
function jump(text) {
  const wanted = text.trim().replace(/\s+/g, "/");
  const place = state.matching.findIndex(({ key }) => key === wanted || key.endsWith(`/${wanted}`));
  if (place < 0) {
    at("count").textContent = `no prompt ${text} among these ${state.matching.length}`;
    return;
  }
  showFrom(place - place % PAGE);
  const found = at("cards").children[place - state.first];
  found.classList.add("found");
  found.scrollIntoView({ block: "center" });
  found.querySelector("a").focus({ preventScroll: true });
}

function card(prompt, pairOnly) {
  const models = pairOnly ? [against(), model()] : state.set.models.map((_, i) => i);
  const header = make("header");
  if (model() !== against()) {
    const gain = change(prompt);
    header.append(make("span", { class: `change ${gain > 0 ? "up" : gain < 0 ? "down" : ""}` }, format(gain, true)));
  }
  header.append(make("p", { class: "text" }, prompt.text || "(empty prompt)"), linkTo(prompt));
  const strip = make("div", { class: "strip" }, ...models.map((i) => thumbnail(prompt, i, models)));
  return make("article", { class: "card", "data-key": prompt.key }, header, strip);
}

function linkTo(prompt) {
  const link = make("a", { class: "tag", href: addressOf(prompt), title: "Link to this prompt" }, nameOf(prompt));
  link.addEventListener("click", (event) => {
    if (event.ctrlKey || event.metaKey || event.shiftKey) return;  // to a tab or window of its own
    event.preventDefault();
    openViewer(prompt);
  });
  return link;
}

function thumbnail(prompt, i, models) {
  const label = `Enlarge: ${state.set.models[i]}, ${nameOf(prompt)}`;
  const button = make("button", { type: "button", "aria-label": label }, imageOf(prompt, i, 0, ["embedded", "link"]));
  button.addEventListener("click", () => openViewer(prompt));
  const of = prompt.images[i].length;
  const scores = prompt.scores[scorer()];
  const caption = make("figcaption", {}, dot(i), `${state.set.models[i]} `, make("b", {}, format(scores[i])),
    of > 1 ? ` mean of ${of}` : "");
  return framed(make("figure", {}, button, caption), i, models.map((m) => scores[m]), scores[i]);
}

const highest = (scores) => Math.max(...scores.filter((score) => score !== null));
const dot = (i) => make("i", { style: `background:${state.set.colours[i]}` });

// A figure with the frame of the highest among these scores, if its own is that.
function framed(figure, i, scores, own) {
  figure.style.setProperty("--frame", state.set.colours[i]);
  figure.classList.toggle("winner", scores.length > 1 && own !== null && own === highest(scores));
  return figure;
}

// An image from the first of its sources that there is: its copy in the page, or the file that it links.
function imageOf(prompt, i, repeat, order) {
  const [number, link] = prompt.images[i][repeat] ?? [-1, ""];
  const of = { embedded: data.embedded[number], link };
  const sources = order.map((name) => of[name]).filter(Boolean);
  if (!sources.length) return make("div", { class: "broken" }, "no image here");
  const image = make("img", { alt: `${state.set.models[i]}: ${prompt.text}`, loading: "lazy", draggable: "false" });
  image.addEventListener("load", () => image.classList.toggle("pixels", image.naturalWidth <= 128));
  image.addEventListener("error", () => {
    sources.shift();
    if (sources.length) image.src = sources[0];
    else image.replaceWith(make("div", { class: "broken" }, `not found: ${link}`));
  });
  image.src = sources[0];
  return image;
}
