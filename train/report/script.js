"use strict";
const all = (selector, root = document) => [...root.querySelectorAll(selector)];
const one = (selector) => document.querySelector(selector);

// Sort a table by a column: cells hold their number in data-v; a cell without it is n/a and comes last in both orders.
function sortBy(header) {
  const table = header.closest("table");
  const headers = all("thead th", table);
  const column = headers.indexOf(header);
  const first = header.querySelector("button").dataset.first;
  const other = first === "ascending" ? "descending" : "ascending";
  const order = header.getAttribute("aria-sort") === first ? other : first;
  headers.forEach((each) => each.setAttribute("aria-sort", each === header ? order : "none"));
  const sign = order === "ascending" ? 1 : -1;
  const value = (row) => row.cells[column].dataset.v;
  const body = table.tBodies[0];
  const rows = [...body.rows].sort((a, b) => {
    const [x, y] = [value(a), value(b)];
    if (x === undefined || y === undefined) return (x === undefined) - (y === undefined);
    return sign * (Number(x) - Number(y));
  });
  body.append(...rows);
}
all("table.sortable thead th button").forEach((button) =>
  button.addEventListener("click", () => sortBy(button.closest("th"))));

// Filter the tables, the curves and the sections on single classes together.
const filter = one("#filter");
const present = one("#present");
const first = one("table.classes");
const supported = new Set(all("tbody tr", first).filter((row) => Number(row.cells[5].dataset.v) > 0)
  .map((row) => row.dataset.name));
function applyFilter() {
  const wanted = filter.value.trim().toLowerCase();
  const shown = (name) => name.includes(wanted) && (!present.checked || supported.has(name));
  all("[data-name]").forEach((each) => { each.hidden = !shown(each.dataset.name); });
  const rows = all("tbody tr", first);
  const left = rows.filter((row) => !row.hidden).length;
  one("#filtered").textContent = left === rows.length ? `All ${rows.length} classes.`
    : `${left} of ${rows.length} classes, here and in the sections below.`;
}
filter.addEventListener("input", applyFilter);
present.addEventListener("change", applyFilter);
applyFilter();

// Open the section on a class when a link points to it, and all of them for printing.
const classes = all("details.class");
one("#open")?.addEventListener("click", () => classes.forEach((each) => { each.open = true; }));
one("#close")?.addEventListener("click", () => classes.forEach((each) => { each.open = false; }));
function openTarget() {
  const target = document.getElementById(decodeURIComponent(location.hash.slice(1)));
  if (!target || target.tagName !== "DETAILS") return;
  target.hidden = false;
  target.open = true;
  target.scrollIntoView();
}
window.addEventListener("hashchange", openTarget);
openTarget();
let closed = [];
window.addEventListener("beforeprint", () => {
  closed = all("details:not([open])");
  closed.forEach((each) => { each.open = true; });
});
window.addEventListener("afterprint", () => closed.forEach((each) => { each.open = false; }));

// Colour the map: the digit of a point is 1 if it shows the chosen class, plus 2 if the class is predicted.
const colour = one("#colour");
const points = all("#map .plot circle");
const original = points.map((point) => point.getAttribute("class"));
colour?.addEventListener("change", () => {
  const codes = colour.selectedOptions[0].dataset.codes;
  one("#by-rarest").hidden = Boolean(codes);
  one("#by-class").hidden = !codes;
  const counts = { c0: 0, c1: 0, c2: 0, c3: 0 };
  points.forEach((point, i) => {
    const kind = codes ? `c${codes[i]}` : original[i];
    if (codes) counts[kind] += 1;
    point.setAttribute("class", kind);
    point.setAttribute("r", kind === "c0" ? 2.4 : 3.6);
  });
  all("[data-count]").forEach((each) => { each.textContent = counts[each.dataset.count]; });
});

// Show the controls that need this script; they are hidden until it runs.
all(".controls, .buttons").forEach((each) => { each.hidden = false; });
