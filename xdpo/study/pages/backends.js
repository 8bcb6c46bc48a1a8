"use strict";

// Where the tasks come from and the votes go. Both back ends have the same small interface:
//   state(), undo()  → the state to show: {title, questions, tie, introduction, done, total, can_undo, task, preload,
//                      previous?, code?, link?}; introduction is null once begin() was called
//   begin()          → the state after the first page was agreed to
//   vote(vote)       → the state after it; vote = {task, answers, seconds, display}; the same vote twice is one vote
//   unsent()         → a vote that this browser still holds and that vote() must be given again, or null
//   mustStay()       → true while closing the page could lose an answer
//   comeBack         → words: how to go on later
//   file()           → {name, text} of the votes to send back; file is null where a server has them
// They throw errors with words for the annotator and a kind:
//   "offline" (try again; the words are the server's, if it had any), "conflict" (this task is settled otherwise),
//   "refused", "unknown" (no such link), "damaged" (what the browser keeps cannot be read).

const problem = (kind, words) => Object.assign(new Error(words), { kind });

// --- the browser's own memory, or a stand-in that is gone with the page ----------------------------------

function browserStorage() {
  try {
    localStorage.setItem("image-study/probe", "1");
    localStorage.removeItem("image-study/probe");
    return {
      lasting: true,
      get: (key) => localStorage.getItem(key),
      set: (key, text) => localStorage.setItem(key, text),
      remove: (key) => localStorage.removeItem(key),
    };
  } catch {  // switched off in the browser's settings, or a private window
    const kept = new Map();
    return {
      lasting: false,
      get: (key) => kept.get(key) ?? null,
      set: (key, text) => kept.set(key, text),
      remove: (key) => kept.delete(key),
    };
  }
}

// --- with a server ---------------------------------------------------------------------------------------

const TIMEOUT_MS = 20000;
const KIND_OF_STATUS = { 404: "unknown", 409: "conflict", 422: "refused" };

async function request(address, body) {
  const options = { cache: "no-store", signal: AbortSignal.timeout(TIMEOUT_MS) };
  if (body) Object.assign(options,
    { method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify(body) });
  let response, content;
  try {
    response = await fetch(address, options);
    content = await response.json();
  } catch {  // no connection, a cut one, or something in between that does not speak for the server
    if (response?.status !== 404) throw problem("offline", "");
  }
  if (response.ok) return content;
  const kind = KIND_OF_STATUS[response.status] ?? "offline";
  throw problem(kind, typeof content?.error === "string" ? content.error : `the server answered ${response.status}`);
}

function serverBackend(address, storage) {
  const outbox = `image-study/unsent${address}`;

  async function vote(ballot) {
    storage.set(outbox, JSON.stringify(ballot));
    try {
      const state = await request(`${address}/vote`, ballot);
      storage.remove(outbox);
      return state;
    } catch (error) {
      // The server has decided: sending it again would change nothing. After any other failure the vote stays here.
      if (error.kind === "conflict" || error.kind === "refused") storage.remove(outbox);
      throw error;
    }
  }

  return {
    comeBack: "Your answers are saved on the server as you give them. Close this page whenever you like and go on " +
      "later with the same link, here or on another device.",
    state: () => request(`${address}/state`),
    undo: () => request(`${address}/undo`, {}),
    begin: () => request(`${address}/begin`, {}),
    vote,
    unsent: () => JSON.parse(storage.get(outbox)),
    mustStay: () => storage.get(outbox) !== null,
    file: null,
  };
}

// --- without one: the tasks stand in window.STUDY, the votes stay in this browser until they are sent back 

const PRELOADED_TASKS = 3;

function localBackend(study, storage) {
  const key = `image-study/votes/${study.id}/${study.annotator}`;
  const agreed = `image-study/agreed/${study.id}/${study.annotator}`;  // when, once the first page was agreed to

  function read() {
    let votes;
    try { votes = JSON.parse(storage.get(key) ?? "[]"); } catch { votes = null; }
    if (Array.isArray(votes)) return votes;
    throw problem("damaged", "The answers kept in this browser cannot be read. Nothing was changed; please tell the " +
      "person who sent you this study.");
  }

  function write(votes) {
    try { storage.set(key, JSON.stringify(votes)); } catch {
      throw problem("refused", "This browser has no room to keep the answer. Save your votes as a file now.");
    }
  }

  function stateAfter(votes, previous) {
    const voted = new Set(votes.map((vote) => vote.task));
    const open = study.tasks.filter((task) => !voted.has(task.task));
    const state = {
      title: study.title, questions: study.questions, tie: study.tie, done: votes.length, total: study.tasks.length,
      introduction: storage.get(agreed) === null ? study.introduction : null,
      can_undo: votes.length > 0, task: open.length ? { ...open[0], number: votes.length + 1 } : null,
      preload: open.slice(1, 1 + PRELOADED_TASKS).flatMap((task) => [task.left, task.right]),
    };
    if (!open.length) Object.assign(state, { code: study.code, link: study.link });
    return previous ? { ...state, previous } : state;
  }

  async function begin() {
    storage.set(agreed, new Date().toISOString());
    return stateAfter(read());
  }

  async function vote({ task, answers, seconds, display }) {
    const votes = read();  // read anew: another tab may have gone on
    const before = votes.find((other) => other.task === task);
    if (before && study.questions.some(({ id }) => before.answers[id] !== answers[id]))
      throw problem("conflict", "This pair was already answered otherwise in another tab.");
    if (!before) write([...votes, { task, answers, seconds, display, at: new Date().toISOString() }]);
    return stateAfter(read());
  }

  async function undo() {
    const votes = read();
    const last = votes.pop();
    if (!last) throw problem("conflict", "There is nothing to undo.");
    write(votes);
    return stateAfter(votes, last.answers);
  }

  return {
    comeBack: storage.lasting
      ? "Your answers are kept in this browser. Close this page whenever you like and open it again in the same " +
        "browser to go on."
      : "This browser keeps nothing when the page is closed: save your votes as a file before you close it.",
    state: async () => stateAfter(read()),
    undo,
    begin,
    vote,
    unsent: () => null,
    mustStay: () => !storage.lasting && read().length > 0,
    file: () => ({
      name: `votes-${study.id}-${study.annotator}.json`,
      text: JSON.stringify(
        { study: study.id, annotator: study.annotator, agreed: storage.get(agreed), votes: read() }, null, 1),
    }),
  };
}
