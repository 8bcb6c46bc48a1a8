// --- one prompt, enlarged: all models, two beside one another, a wipe between them, or one after the other --------

const viewer = { prompt: null, view: "all", repeat: 0, scale: 1, x: 0.5, y: 0.5 };  // x, y: the middle, from 0 to 1
const pointers = new Map();  // of the fingers or the mouse on an image: where each was last
const VIEWS = ["all", "two", "wipe", "blink"];
const STEP = 1.25;

function openViewer(prompt) {
  if (!at("viewer").open) zoomTo(1);
  viewer.prompt = prompt;
  viewer.repeat = Math.min(viewer.repeat, repeatsOf(prompt) - 1);
  drawViewer();
  if (!at("viewer").open) at("viewer").showModal();
  showZoom();
  writeAddress();
}

function closeViewer() {
  at("viewer").close();
}

function closed() {
  const key = viewer.prompt?.key;
  viewer.prompt = null;
  writeAddress();
  [...at("cards").children].find((card) => card.dataset.key === key)?.querySelector("a").focus();
}

function step(by) {
  const next = state.matching[state.matching.indexOf(viewer.prompt) + by];
  if (next) openViewer(next);
}

function setView(view) {
  viewer.view = view;
  at("viewer-images").classList.remove("flipped");
  drawViewer();
  writeAddress();
}

// The models of the pair are those of the page's controls.
function choosePair() {
  controls.against.value = at("left").value;
  controls.model.value = at("right").value;
  viewer.repeat = Number(at("repeat").value);
  show();
  drawViewer();
  writeAddress();
}

function drawViewer() {
  const { prompt } = viewer, view = state.set.models.length > 1 ? viewer.view : "all";
  at("viewer-text").replaceChildren(make("b", {}, prompt.text || "(empty prompt)"), make("br"),
    make("span", { class: "tag" }, `${state.set.name} · ${nameOf(prompt)} · frame: highest ${controls.metric.value}`));
  const repeats = [...Array(repeatsOf(prompt)).keys()];
  fill(at("left"), named(state.set.models), controls.against.value);
  fill(at("right"), named(state.set.models), controls.model.value);
  fill(at("repeat"), repeats.map((repeat) => [repeat, repeat + 1]), viewer.repeat);
  at("repeat").parentElement.hidden = repeats.length === 1;
  at("pair").hidden = view === "all";
  at("view").hidden = state.set.models.length < 2;
  for (const button of at("view").children) button.setAttribute("aria-pressed", button.dataset.view === view);
  const all = state.set.models.map((_, i) => i), pair = [against(), model()];
  at("viewer-images").dataset.view = view;
  at("viewer-images").replaceChildren(...{
    all: () => repeats.flatMap((repeat) => all.map((i) => enlarged(prompt, i, repeat, all, true))),
    two: () => pair.map((i) => enlarged(prompt, i, viewer.repeat, pair, true)),
    wipe: () => overlaid(prompt, pair, wipe()),
    blink: () => overlaid(prompt, pair, flipButton()),
  }[view]());
}

function enlarged(prompt, i, repeat, models, withImage) {
  const scores = models.map((m) => scoreOf(prompt, scorer(), m, repeat));
  const caption = make("figcaption", {}, make("p", {}, dot(i), make("b", {}, state.set.models[i]),
    repeatsOf(prompt) > 1 ? `, image ${repeat + 1}` : ""), facts(prompt, i, repeat, models));
  const stage = withImage ? [make("div", { class: "stage" }, layer(prompt, i, repeat))] : [];
  return framed(make("figure", {}, ...stage, caption), i, scores, scoreOf(prompt, scorer(), i, repeat));
}

// The whole file where it is found, else its copy in the page.
function layer(prompt, i, repeat) {
  const image = imageOf(prompt, i, repeat, ["link", "embedded"]);
  image.loading = "eager";
  const shown = make("div", { class: "layer" }, image);
  image.addEventListener("load", () => {
    showZoom();
    const [, link] = prompt.images[i][repeat];
    if (image.src.startsWith("data:")) shown.append(make("span", { class: "badge copy", title: link }, "copy in this page"));
  });
  return shown;
}

function overlaid(prompt, pair, control) {
  const layers = pair.map((i) => layer(prompt, i, viewer.repeat));
  pair.forEach((i, side) => layers[side].append(make("b", { class: "badge" }, dot(i), state.set.models[i])));
  const stage = make("div", { class: "stage" }, ...layers);
  return [make("div", { class: "overlaid" }, stage, control),
    ...pair.map((i) => enlarged(prompt, i, viewer.repeat, pair, false))];
}

function wipe() {
  const slider = make("input", { type: "range", min: 0, max: 100, step: 0.5, value: 50, "aria-label": "Wipe" });
  const place = () => at("viewer-images").style.setProperty("--wipe", `${slider.value}%`);
  slider.addEventListener("input", place);
  place();
  return slider;
}

function flipButton() {
  const button = make("button", { type: "button", class: "step" }, "Show the other (b)");
  button.addEventListener("click", flip);
  return button;
}

function flip() {
  at("viewer-images").classList.toggle("flipped");
}

// All metrics, the seed and the settings. Bold is the highest among the models; ≠ is not as the baseline's.
function facts(prompt, i, repeat, models) {
  const { scorers, settings } = state.set;
  const list = make("dl");
  scorers.forEach((name, s) => {
    const own = scoreOf(prompt, s, i, repeat);
    const top = own !== null && own === highest(models.map((m) => scoreOf(prompt, s, m, repeat)));
    const mean = prompt.images[i].length > 1 ? make("small", {}, ` mean ${format(prompt.scores[s][i])}`) : "";
    list.append(make("dt", {}, name), make("dd", {}, make(top ? "b" : "span", {}, format(own)), mean));
  });
  const seed = prompt.images[i][repeat]?.[2] ?? "unknown";
  list.append(make("dt", { class: "setting" }, "Seed"), make("dd", { class: "setting" }, String(seed)));
  for (const [fact, text, differs] of settings[i])
    list.append(make("dt", { class: "setting" }, fact), make("dd", { class: "setting" }, differs ? `${text} ≠` : text));
  return list;
}

// --- zoom and pan: one place and size for all images of the viewer ---------------------------------------------------

// The scale at which a pixel of the image is one of the screen; 1 is the whole image in its place.
function scaleOfPixels() {
  const image = at("viewer-images").querySelector("img");
  const stage = image?.closest(".stage");
  if (!stage || !image.naturalWidth || !stage.clientWidth) return 1;
  const fit = Math.min(stage.clientWidth / image.naturalWidth, stage.clientHeight / image.naturalHeight);
  return 1 / (fit * devicePixelRatio);
}

const clamp = (value, low, high) => Math.min(Math.max(value, low), high);

function zoomTo(scale, x = viewer.x, y = viewer.y) {
  const pixels = scaleOfPixels();
  viewer.scale = clamp(scale, Math.min(1, pixels), Math.max(16, 16 * pixels));
  const reach = Math.max(0, 0.5 - 0.5 / viewer.scale);
  viewer.x = clamp(x, 0.5 - reach, 0.5 + reach);
  viewer.y = clamp(y, 0.5 - reach, 0.5 + reach);
  showZoom();
}

// Zoom so that the point under the pointer stays there.
function zoomAt(stage, { clientX, clientY }, scale) {
  const box = stage.getBoundingClientRect();
  const right = (clientX - box.left) / box.width - 0.5, down = (clientY - box.top) / box.height - 0.5;
  const x = viewer.x + right / viewer.scale, y = viewer.y + down / viewer.scale;
  zoomTo(scale, x - right / scale, y - down / scale);
}

function showZoom() {
  const { style, classList } = at("viewer-images"), level = viewer.scale / scaleOfPixels();
  style.setProperty("--scale", viewer.scale);
  style.setProperty("--x", `${100 * (0.5 - viewer.x)}%`);
  style.setProperty("--y", `${100 * (0.5 - viewer.y)}%`);
  classList.toggle("zoomed", viewer.scale > 1);
  classList.toggle("pixelated", level >= 3);
  at("zoom-level").textContent = `${Math.round(100 * level)} %`;
}

const ZOOMS = {
  in: () => zoomTo(viewer.scale * STEP),
  out: () => zoomTo(viewer.scale / STEP),
  fit: () => zoomTo(1),
  pixels: () => zoomTo(scaleOfPixels()),
};

function pointerDown(event) {
  const stage = event.target.closest(".stage");
  if (!stage) return;
  stage.setPointerCapture(event.pointerId);
  pointers.set(event.pointerId, event);
}

function pointerMove(event) {
  const before = pointers.get(event.pointerId), stage = event.target.closest(".stage");
  if (!before || !stage) return;
  pointers.set(event.pointerId, event);
  if (pointers.size === 1) {
    const size = stage.clientWidth * viewer.scale;
    zoomTo(viewer.scale, viewer.x - (event.clientX - before.clientX) / size, viewer.y - (event.clientY - before.clientY) / size);
  } else {
    const other = [...pointers.values()].find((pointer) => pointer.pointerId !== event.pointerId);
    const apart = (pointer) => Math.hypot(pointer.clientX - other.clientX, pointer.clientY - other.clientY);
    zoomAt(stage, other, viewer.scale * apart(event) / Math.max(1, apart(before)));
  }
}

function pointerUp(event) {
  pointers.delete(event.pointerId);
}

function wheel(event) {
  const stage = event.target.closest(".stage");
  if (!stage) return;
  event.preventDefault();
  zoomAt(stage, event, viewer.scale * 2 ** (-event.deltaY / 300));
}

function doubleClick(event) {
  const stage = event.target.closest(".stage");
  if (stage) zoomAt(stage, event, viewer.scale === 1 ? scaleOfPixels() : 1);
}

// --- keys ------------------------------------------------------------------------------------------------------------

const KEYS = {
  ArrowLeft: () => step(-1),
  ArrowRight: () => step(1),
  "+": ZOOMS.in,
  "=": ZOOMS.in,
  "-": ZOOMS.out,
  0: ZOOMS.fit,
  1: ZOOMS.pixels,
  a: () => setView("all"),
  t: () => setView("two"),
  w: () => setView("wipe"),
  b: () => (viewer.view === "blink" ? flip() : setView("blink")),
};

function pressed(event) {
  const typing = event.target.matches("input, select") || event.ctrlKey || event.metaKey || event.altKey;
  if (!typing) KEYS[event.key]?.();
}
