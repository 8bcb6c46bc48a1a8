"use strict";
// Reload while the run trains, say how old the page is, and read curves under the pointer.
const { written, refresh, expected } = document.body.dataset;
const age = () => (Date.now() - Date.parse(written)) / 1000;
const span = (seconds) =>
  seconds < 90 ? `${Math.round(seconds)} s` : seconds < 5400 ? `${Math.round(seconds / 60)} min` : `${Math.round(seconds / 3600)} h`;

if (Number(refresh)) {
  const silent = Math.max(300, 20 * Number(expected));
  const tell = () => {
    document.getElementById("written").textContent = `updated ${span(Math.max(0, age()))} ago`;
    if (age() > silent) {
      const note = document.getElementById("silent");
      note.textContent = `No news for ${span(age())}: the run has ended without saying so, or something takes very long. Look at its log.`;
      note.hidden = false;
    }
  };
  tell();
  setInterval(tell, 1000);
  setInterval(() => document.hidden || location.reload(), 1000 * Number(refresh));
}

const sheets = document.querySelector(".sheets");
if (sheets) {
  const kept = `sheets of ${location.pathname}`;
  sheets.scrollLeft = Number(sessionStorage.getItem(kept));
  sheets.addEventListener("scroll", () => sessionStorage.setItem(kept, sheets.scrollLeft));
}

const number = (value, isShare) =>
  String(Number((isShare ? 100 * value : value).toPrecision(3))).replace("-", "−") + (isShare ? " %" : "");
for (const svg of document.querySelectorAll(".chart svg")) {
  const [left, top, right, bottom] = svg.dataset.box.split(" ").map(Number);
  const low = Number(svg.dataset.low), high = Number(svg.dataset.high), last = Number(svg.dataset.right);
  const note = svg.parentElement.querySelector(".note"), values = [...svg.parentElement.querySelectorAll(".legend b")];
  const usual = [note, ...values].map((element) => [element, element.textContent]);
  const cursor = document.createElementNS(svg.namespaceURI, "polyline");
  cursor.setAttribute("class", "cursor");
  svg.append(cursor);
  svg.addEventListener("pointermove", (event) => {
    const x = new DOMPoint(event.clientX, event.clientY).matrixTransform(svg.getScreenCTM().inverse()).x;
    const steps = new Set();
    for (const line of svg.querySelectorAll("[data-line]")) {
      const point = [...line.points].reduce((best, next) => (Math.abs(next.x - x) < Math.abs(best.x - x) ? next : best));
      steps.add(Math.round(((point.x - left) / (right - left)) * last).toLocaleString("en"));
      values[line.dataset.line].textContent = number(low + ((bottom - point.y) / (bottom - top)) * (high - low), "share" in svg.dataset);
    }
    note.textContent = `At step ${[...steps].join(" and ")}; every curve at its own step nearest to the pointer.`;
    cursor.setAttribute("points", `${x},${top} ${x},${bottom}`);
  });
  svg.addEventListener("pointerleave", () => {
    for (const [element, text] of usual) element.textContent = text;
    cursor.removeAttribute("points");
  });
}
