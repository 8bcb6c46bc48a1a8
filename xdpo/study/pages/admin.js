"use strict";

// The administrator's view: how far the study is and which link is whose. It shows numbers of votes, never answers.

const RENEW_SECONDS = 10;
const at = (id) => document.getElementById(id);

// Text goes into the page as text only.
function make(tag, attributes = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  node.append(...children);
  return node;
}

const rows = new Map();  // annotator's number → what its row shows; kept, so that renewing leaves the focus where it is

function show(study) {
  const finished = study.annotators.filter((annotator) => annotator.total > 0 && annotator.done >= annotator.total);
  document.title = `${study.votes} of ${study.votes_wanted} votes – ${study.title}`;
  at("title").textContent = study.title;
  at("votes").textContent = `${study.votes} of ${study.votes_wanted}`;
  at("progress").max = Math.max(study.votes_wanted, 1);
  at("progress").value = study.votes;
  at("items").textContent = `${study.complete_items} of ${study.items}`;
  at("finished").textContent = `${finished.length} of ${study.annotators.length}`;
  for (const annotator of study.annotators) {
    if (!rows.has(annotator.number)) rows.set(annotator.number, addRow(annotator));
    const { bar, count, seen } = rows.get(annotator.number);
    bar.max = Math.max(annotator.total, 1);
    bar.value = annotator.done;
    count.textContent = `${annotator.done} of ${annotator.total}`;
    seen.textContent = annotator.last_seen ? new Date(annotator.last_seen).toLocaleString() : "not yet";
  }
}

function addRow(annotator) {
  const name = `Annotator ${annotator.number}`;
  const bar = make("progress", { "aria-label": `Progress of ${name}` });
  const count = make("span"), seen = make("td");
  const copy = make("button", { type: "button", "aria-label": `Copy link of ${name}` }, "Copy link");
  copy.addEventListener("click", () => copyLink(name, new URL(annotator.link, location.href).href));
  at("annotators").append(
    make("tr", {}, make("th", { scope: "row" }, name), make("td", {}, copy), make("td", {}, bar, count), seen,
      make("td", {}, annotator.code ?? "–")));
  return { bar, count, seen };
}

async function copyLink(name, link) {
  try {
    await navigator.clipboard.writeText(link);
    at("message").textContent = `The link of ${name} is copied.`;
  } catch {  // browsers give the clipboard to https and localhost only
    at("message").textContent = `The link of ${name}: ${link}`;
  }
}

async function renew() {
  if (document.hidden) return;
  try {
    const response = await fetch(`${location.pathname}/state`, { cache: "no-store" });
    if (!response.ok) throw new Error(`the server answered ${response.status}`);
    show(await response.json());
    if (at("message").classList.contains("lost")) at("message").textContent = "";
    at("message").classList.remove("lost");
  } catch (error) {
    at("message").textContent = `These numbers are not up to date: ${error.message}. It is tried again by itself.`;
    at("message").classList.add("lost");
  }
}

document.addEventListener("visibilitychange", renew);
setInterval(renew, 1000 * RENEW_SECONDS);
renew();
