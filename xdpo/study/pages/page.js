"use strict";

// One annotator's page: shows the state that the back end gives (backends.js) and turns clicks and keys into votes.

const at = (id) => document.getElementById(id);
const SIDES = ["left", "right"];
const NAME_OF = { left: "Left image", right: "Right image" };
const TIE = "tie";
const RETRY_SECONDS = [1, 2, 4, 8, 15];
const LONG_PROMPT = 200;  // characters; set smaller, but always shown whole
const SMALL_PIXELS = 128;  // images this small are shown pixel by pixel

const storage = browserStorage();
const backend = window.STUDY ? localBackend(window.STUDY, storage) : serverBackend(location.pathname, storage);
const page = { state: null, ready: false, busy: false };  // ready: both images are on the screen

// Text goes into the page as text only.
function make(tag, attributes = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  node.append(...children);
  return node;
}

function say(words) {
  at("message").textContent = words;
}

const sentence = (words) => `${words.charAt(0).toUpperCase()}${words.slice(1)}${words.endsWith(".") ? "" : "."}`;

// --- time spent looking: stands still while the page is hidden or paused ---------------------------------

const clock = { total: 0, since: null };

function runClock(running) {
  const now = performance.now();
  if (clock.since !== null) clock.total += now - clock.since;
  clock.since = running ? now : null;
}

function secondsLooked() {
  runClock(clock.since !== null);
  return clock.total / 1000;
}

const mayUndo = () => page.state?.can_undo && (!at("ballot").hidden || !at("end").hidden);
const choicesOf = (state) => (state.tie ? ["left", TIE, "right"] : SIDES);
const looking = () => page.ready && !document.hidden && !at("ballot").hidden;

// --- trouble: said in words, tried again by itself and on request ----------------------------------------

async function keepTrying(action, words, wanted = () => true) {
  for (let attempt = 0; wanted(); attempt++) {
    try {
      const result = await action();
      if (wanted()) at("trouble").hidden = true;
      return result;
    } catch (error) {
      if (error.kind !== "offline") {
        at("trouble").hidden = true;
        throw error;
      }
      if (wanted()) await waitBeforeRetry(attempt, error.message ? `${words} (${error.message})` : words);
    }
  }
}

function waitBeforeRetry(attempt, words) {
  // Set once per trouble: a screen reader reads an alert again whenever its text is set.
  if (at("trouble").hidden || at("trouble-words").textContent !== words) at("trouble-words").textContent = words;
  at("trouble").hidden = false;
  const seconds = RETRY_SECONDS[Math.min(attempt, RETRY_SECONDS.length - 1)];
  return new Promise((resolve) => {
    setTimeout(resolve, 1000 * seconds);
    at("retry").addEventListener("click", resolve, { once: true });
    addEventListener("online", resolve, { once: true });
  });
}

// --- images: loaded ahead, and the very element that was loaded is the one shown -------------------------

const images = new Map();

function imageAt(address) {
  if (!images.has(address)) images.set(address, Object.assign(new Image(), { src: address, draggable: false }));
  return images.get(address);
}

async function loadImage(address) {
  try {
    await imageAt(address).decode();
  } catch {
    images.delete(address);  // so that the next try asks again
    throw problem("offline", "");
  }
}

async function showImages(state) {
  const wanted = () => page.state === state;
  page.ready = false;
  for (const side of SIDES) at(side).replaceChildren(make("span", { class: "loading" }, "Loading …"));
  const words = "An image did not load; it is tried again by itself. If it stays so, tell the person who invited you.";
  await Promise.all(SIDES.map((side) => keepTrying(() => loadImage(state.task[side]), words, wanted)));
  if (!wanted()) return;
  const pair = SIDES.map((side) => imageAt(state.task[side]));
  const small = pair.every((image) => image.naturalWidth <= SMALL_PIXELS);
  SIDES.forEach((side, i) => {
    pair[i].alt = NAME_OF[side];
    pair[i].classList.toggle("pixels", small);
    at(side).replaceChildren(pair[i]);
  });
  page.ready = true;
  runClock(looking());
  loadAhead(state);
}

function loadAhead(state) {
  const kept = new Set([...state.preload, state.task.left, state.task.right]);
  for (const address of images.keys()) if (!kept.has(address)) images.delete(address);
  state.preload.forEach(imageAt);
}

// --- the screens -----------------------------------------------------------------------------------------

function showScreen(id) {
  for (const screen of document.querySelectorAll(".screen")) screen.hidden = screen.id !== id;
  at("pause").hidden = at("submit").hidden = id !== "ballot";
  at("undo").hidden = !mayUndo();
  at("save").hidden = !backend.file || id === "failure";
  at("save").classList.toggle("primary", id === "end");
  at(id).querySelector("h2").focus({ preventScroll: true });
  scrollTo(0, 0);
}

function show(state) {
  page.state = state;
  at("trouble").hidden = true;
  runClock(false);
  clock.total = 0;
  document.title = state.title;
  at("title").textContent = state.title;
  at("progress").max = Math.max(state.total, 1);
  at("progress").value = state.done;
  at("count").textContent = `${state.done} of ${state.total} answered`;
  for (const words of document.querySelectorAll(".rule")) words.textContent = state.tie
    ? `Answer each question by choosing one of the two, or “${state.tie}”.`
    : "Answer each question by choosing one of the two; there is no “both”, so take the better one even if they are close.";
  if (state.task && state.introduction) showIntroduction(state);
  else if (state.task) showTask(state);
  else showEnd(state);
}

function showIntroduction({ introduction, total }) {
  const { example } = introduction;
  const paragraphs = [...introduction.instructions.split(/\n\s*\n/), `There are ${total} pairs.`];
  at("instructions").replaceChildren(...paragraphs.map((words) => make("p", {}, words)));
  at("example-prompt").textContent = example.prompt;
  at("example").replaceChildren(...SIDES.map((side) => make("img", { src: example[side], alt: NAME_OF[side] })));
  at("example-words").textContent = example.words;
  at("consent-words").textContent = introduction.consent;
  showScreen("introduction");
}

function begin() {
  if (!at("agree").checked) {
    say("Please tick the box to begin.");
    return at("agree").focus();
  }
  alone(async () => {
    show(await keepTrying(backend.begin, "The study cannot be reached just now. It is tried again by itself."));
    say("");
  });
}

function showTask(state) {
  at("prompt-text").textContent = state.task.prompt || "(empty prompt)";
  at("prompt").classList.toggle("long", state.task.prompt.length > LONG_PROMPT);
  const choices = choicesOf(state);
  at("questions").replaceChildren(
    ...state.questions.map((question, i) => fieldset(question, i, choices, state.previous ?? {})));
  at("keys").replaceChildren(...keyRows(state.questions, choices));
  showScreen("ballot");
  showImages(state);
}

function fieldset(question, number, choices, previous) {
  const options = choices.map((choice, i) => {
    const input = make("input", { type: "radio", name: question.id, value: choice, required: "" });
    input.checked = previous[question.id] === choice;
    const key = make("kbd", { "aria-hidden": "true" }, choices.length * number + i + 1);
    return make("label", {}, input, make("span", {}, NAME_OF[choice] ?? page.state.tie), key);
  });
  const kind = choices.includes(TIE) ? { class: "with-tie" } : {};
  return make("fieldset", kind, make("legend", {}, question.text), make("div", { class: "options" }, ...options));
}

// How large the images stand on the screen, in CSS pixels; both stand in equal boxes.
function display() {
  const image = at("left").querySelector("img");
  const scale = Math.min(image.clientWidth / image.naturalWidth, image.clientHeight / image.naturalHeight);
  const [width, height] = [image.naturalWidth, image.naturalHeight].map((side) => Math.round(10 * scale * side) / 10);
  return { width, height, ratio: devicePixelRatio };
}

function showEnd(state) {
  const next = backend.file ? "One thing is left: save your votes and send the file back." : "You can close this page.";
  at("end-words").textContent = `You have answered all ${state.total} pairs. ${next}`;
  at("completion").hidden = !state.code;
  at("code").textContent = state.code ?? "";
  at("way-back").hidden = !state.link;
  if (state.link) at("link").href = state.link;
  showScreen("end");
}

async function copyCode() {
  try {
    await navigator.clipboard.writeText(at("code").textContent);
    say("The code is copied.");
  } catch {  // browsers give the clipboard to https and localhost only
    getSelection().selectAllChildren(at("code"));
    say("Copy the marked code.");
  }
}

function showFailure(words) {
  at("failure-words").textContent = words;
  showScreen("failure");
}

// --- asking the back end ---------------------------------------------------------------------------------

// One request at a time; whatever goes wrong ends in words on the page.
async function alone(action) {
  if (page.busy) return;
  page.busy = true;
  document.body.setAttribute("aria-busy", "true");
  try {
    await action();
  } catch (error) {
    if (error.kind === "refused") say(sentence(error.message));
    else if (error.kind !== "unknown") showFailure(sentence(error.message));
    else showFailure("This link is not known. Please check it with the person who sent it.");
  } finally {
    page.busy = false;
    document.body.removeAttribute("aria-busy");
  }
}

async function load() {
  show(await keepTrying(backend.state, "The study cannot be reached just now. It is tried again by itself."));
}

async function send(vote) {
  try {
    show(await keepTrying(() => backend.vote(vote),
      "The study cannot be reached just now. Your answer is kept on this page and sent again by itself; " +
      "please leave the page open until this message is gone."));
    say("Answer recorded." + (page.state.task ? ` Pair ${page.state.task.number} of ${page.state.total}.` : ""));
  } catch (error) {
    if (error.kind !== "conflict" && error.kind !== "refused") throw error;
    await load();
    say(error.kind === "refused" ? `${sentence(error.message)} Your answer was not used.`
      : "This pair was answered before in another window or on another device; your answer here was not used.");
  }
}

function submit() {
  const { state } = page;
  const answers = Object.fromEntries(new FormData(at("ballot")));
  const missing = state.questions.find((question) => !answers[question.id]);
  if (!page.ready) return say("The images are still loading.");
  if (missing) {
    say(`Please answer: “${missing.text}”`);
    return at("questions").querySelector(`[name="${CSS.escape(missing.id)}"]`).focus();
  }
  const seconds = Math.round(1000 * secondsLooked()) / 1000;
  alone(() => send({ task: state.task.task, answers, seconds, display: display() }));
}

function undo() {
  if (!mayUndo()) return;
  alone(async () => {
    try {
      show(await backend.undo());
      say(`Your answer to pair ${page.state.task.number} is withdrawn. Change it if you like, and submit it again.`);
    } catch (error) {
      // Not tried again: if only the reply was lost, a second undo would take back another answer.
      if (error.kind !== "offline" && error.kind !== "conflict") throw error;
      await load();
      say(error.kind === "conflict" ? sentence(error.message)
        : "The connection was cut during undo; this is how the study stands now.");
    }
  });
}

function pause() {
  if (at("ballot").hidden || page.busy) return;
  showScreen("break");
  runClock(false);
  say("");
}

function goOn() {
  showScreen("ballot");
  runClock(looking());
}

// --- without a server: the votes as a file ---------------------------------------------------------------

function save() {
  const { name, text } = backend.file();
  const link = make("a", { href: URL.createObjectURL(new Blob([text], { type: "application/json" })), download: name });
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 60000);
  say(`Saved as ${name}. Please send this file back.`);
}

// --- an image, enlarged: both in the same place and size, to be compared by switching --------------------

function enlarge(side) {
  if (!page.ready || at("ballot").hidden) return;
  const other = SIDES.find((name) => name !== side);
  at("zoom-title").textContent = NAME_OF[side];
  const key = make("kbd", { "aria-hidden": "true" }, other === "left" ? "←" : "→");
  at("zoom-other").replaceChildren(`Show ${NAME_OF[other].toLowerCase()} `, key);
  at("zoom-other").dataset.side = other;
  at("zoomed").replaceChildren(imageAt(page.state.task[side]).cloneNode());
  if (!at("zoom").open) at("zoom").showModal();
}

// --- keys ------------------------------------------------------------------------------------------------

function keyRows(questions, choices) {
  const withTie = choices.includes(TIE), names = withTie ? "left, neither or right" : "left or right";
  const rows = questions.map((question, i) =>
    [choices.map((_, number) => choices.length * i + number + 1), `${names}: ${question.text}`]);
  rows.push([withTie ? ["←", "↓", "→"] : ["←", "→"], `${names}, for the next question without an answer`],
    [["Enter"], "submit"],
    [["Z", "Backspace"], "undo: take the last answer back"], [["L", "R"], "enlarge the left or right image"],
    [["P"], "pause"]);
  return rows.map(([keys, what]) => make("tr", {},
    make("th", { scope: "row" }, ...keys.flatMap((key) => [make("kbd", {}, key), " "])), make("td", {}, what)));
}

function choose(question, side) {
  if (question) at("questions").querySelector(`[name="${CSS.escape(question.id)}"][value="${side}"]`).checked = true;
}

function chooseNext(side) {
  const answers = new FormData(at("ballot"));
  choose(page.state.questions.find((question) => !answers.has(question.id)), side);
}

const KEYS = {
  ArrowLeft: () => chooseNext("left"),
  ArrowRight: () => chooseNext("right"),
  ArrowDown: () => chooseNext(TIE),
  Enter: () => at("ballot").requestSubmit(),
  l: () => enlarge("left"),
  r: () => enlarge("right"),
  p: pause,
};

function onKey(event) {
  if (event.ctrlKey || event.altKey || event.metaKey || event.repeat || !at("shortcuts").checked || page.busy) return;
  const key = event.key.length === 1 ? event.key.toLowerCase() : event.key;
  if (at("zoom").open) {
    const side = { ArrowLeft: "left", l: "left", ArrowRight: "right", r: "right" }[key];
    if (side) enlarge(side);
    return;
  }
  // A focused control keeps its own meaning of Enter and of the arrows.
  const native = event.target.closest("button, a, summary, input");
  if (native && (key === "Enter" || (key.startsWith("Arrow") && native.type === "radio"))) return;
  if (key === "z" || key === "Backspace") {
    event.preventDefault();
    return undo();
  }
  if (at("ballot").hidden) return;
  const number = /^[1-9]$/.test(key) ? Number(key) - 1 : -1;
  const choices = choicesOf(page.state);
  if (number >= 0)
    return choose(page.state.questions[Math.floor(number / choices.length)], choices[number % choices.length]);
  if (!Object.hasOwn(KEYS, key) || (key === "ArrowDown" && !page.state.tie)) return;
  event.preventDefault();
  KEYS[key]();
}

// --- controls --------------------------------------------------------------------------------------------

at("ballot").addEventListener("submit", (event) => { event.preventDefault(); submit(); });
at("questions").addEventListener("click", (event) => page.busy && event.preventDefault());  // what is sent stays so
at("consent").addEventListener("submit", (event) => { event.preventDefault(); begin(); });
at("copy").addEventListener("click", copyCode);
at("undo").addEventListener("click", undo);
for (const side of SIDES) at(side).addEventListener("click", () => enlarge(side));
at("pause").addEventListener("click", pause);
at("continue").addEventListener("click", goOn);
at("save").addEventListener("click", save);
at("zoom-other").addEventListener("click", (event) => enlarge(event.currentTarget.dataset.side));
at("zoom-close").addEventListener("click", () => at("zoom").close());
at("zoomed").addEventListener("click", () => at("zoom").close());
at("shortcuts").addEventListener("change", (event) => document.body.classList.toggle("no-keys", !event.target.checked));
document.addEventListener("keydown", onKey);
document.addEventListener("visibilitychange", () => runClock(looking()));
addEventListener("beforeunload", (event) => backend.mustStay() && event.preventDefault());

for (const words of document.querySelectorAll(".come-back")) words.textContent = backend.comeBack;
at("forgetful").hidden = !backend.file || storage.lasting;
alone(async () => {
  const kept = backend.unsent();
  await (kept ? send(kept) : load());
});
