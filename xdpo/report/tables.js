"use strict";

// --- sortable tables: a click on a head sorts, the next one turns the order round ------------------------------

function compareCells(column, numeric, sign) {
  const value = (row) => row.cells[column].dataset.value;
  return (one, other) => {
    const [x, y] = [value(one), value(other)];
    if (x === "" || y === "") return (x === "") - (y === "");  // empty ones last, either way round
    return sign * (numeric ? x - y : x.localeCompare(y, undefined, { numeric: true }));
  };
}

function sortBy(table, head) {
  const numeric = head.classList.contains("number");
  const before = head.getAttribute("aria-sort");
  const direction = before ? (before === "ascending" ? "descending" : "ascending") : numeric ? "descending" : "ascending";
  for (const other of table.tHead.rows[0].cells) other.removeAttribute("aria-sort");
  head.setAttribute("aria-sort", direction);
  const order = compareCells(head.cellIndex, numeric, direction === "ascending" ? 1 : -1);
  table.tBodies[0].append(...[...table.tBodies[0].rows].sort(order));
}

function makeSortable(table) {
  for (const head of table.tHead.rows[0].cells) {
    const button = document.createElement("button");
    button.type = "button";
    button.append(...head.childNodes);
    button.addEventListener("click", () => sortBy(table, head));
    head.append(button);
  }
}

document.querySelectorAll("table.sortable").forEach(makeSortable);
