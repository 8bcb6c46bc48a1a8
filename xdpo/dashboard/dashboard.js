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

const number = (value) => String(Number(value.toPrecision(3))).replace("-", "−");
for (const svg of document.querySelectorAll(".chart svg")) {
  const [left, top, right, bottom] = svg.dataset.box.split(" ").map(Number);
  const low = Number(svg.dataset.low), high = Number(svg.dataset.high), last = Number(svg.dataset.right);
  const note = svg.parentElement.querySelector(".note"), usual = note.textContent;
  const cursor = document.createElementNS(svg.namespaceURI, "polyline");
  cursor.setAttribute("class", "cursor");
  svg.append(cursor);
  svg.addEventListener("pointermove", (event) => {
    const x = new DOMPoint(event.clientX, event.clientY).matrixTransform(svg.getScreenCTM().inverse()).x;
    const read = [...svg.querySelectorAll("[data-label]")].map((line) => {
      const point = [...line.points].reduce((best, next) => (Math.abs(next.x - x) < Math.abs(best.x - x) ? next : best));
      const step = Math.round(((point.x - left) / (right - left)) * last);
      return `${line.dataset.label} ${number(low + ((bottom - point.y) / (bottom - top)) * (high - low))} at step ${step.toLocaleString("en")}`;
    });
    note.textContent = read.join(" · ");
    cursor.setAttribute("points", `${x},${top} ${x},${bottom}`);
  });
  svg.addEventListener("pointerleave", () => {
    note.textContent = usual;
    cursor.removeAttribute("points");
  });
}
