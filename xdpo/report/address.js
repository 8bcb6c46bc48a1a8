// --- the address: filters and the open prompt, so that a link shows what its sender saw ---------------------------

// What the controls say unless a reader changes them. A link holds only what differs.
function defaults() {
  const { scorers, model, baseline } = state.set;
  const set = data.sets[0].name;
  return { set, category: "", metric: scorers[0], model, against: baseline, only: "", order: "number", find: "" };
}

function addressOf(prompt) {
  const usual = defaults();
  const said = [...new FormData(at("controls"))].filter(([name, value]) => value !== usual[name]);
  if (prompt) said.push(["prompt", prompt.key]);
  if (prompt && prompt === viewer.prompt && viewer.view !== "all") said.push(["view", viewer.view]);
  return said.length ? `#${new URLSearchParams(said)}` : "#images";
}

function writeAddress() {
  history.replaceState(null, "", addressOf(viewer.prompt));
}

// Does nothing for the anchors of sections, which have no "=".
function readAddress() {
  const said = new URLSearchParams(location.hash.slice(1));
  if (!location.hash.includes("=")) return;
  chooseSet(said.get("set"));
  for (const [name, usual] of Object.entries(defaults()).slice(1)) {
    controls[name].value = said.get(name) ?? usual;
    if (controls[name].selectedIndex === -1) controls[name].value = usual;  // of a report with other models or metrics
  }
  show();
  const prompt = state.set.prompts.find(({ key }) => key === said.get("prompt"));
  viewer.view = VIEWS.find((view) => view === said.get("view")) ?? "all";
  if (prompt) openViewer(prompt);
  else at("images").scrollIntoView();
}

function controlsChanged(event) {
  if (event.target === controls.set) chooseSet(controls.set.value);
  show();
  writeAddress();
}

// --- start -------------------------------------------------------------------------------------------------------------

for (const image of document.querySelectorAll("#still [data-embedded]")) data.embedded[image.dataset.embedded] = image.src;
at("still").remove();
at("browser").hidden = false;

at("controls").addEventListener("submit", (event) => event.preventDefault());
controls.find.addEventListener("input", controlsChanged);
at("controls").querySelectorAll("select").forEach((select) => select.addEventListener("change", controlsChanged));
at("jump").addEventListener("submit", (event) => {
  event.preventDefault();
  jump(event.target.elements[0].value);
});
at("more").addEventListener("click", showMore);
at("earlier").addEventListener("click", showEarlier);

at("viewer-close").addEventListener("click", closeViewer);
at("viewer-previous").addEventListener("click", () => step(-1));
at("viewer-next").addEventListener("click", () => step(1));
at("viewer").addEventListener("close", closed);
at("viewer").addEventListener("click", (event) => event.target === at("viewer") && closeViewer());
at("viewer").addEventListener("keydown", pressed);
for (const button of at("view").children) button.addEventListener("click", () => setView(button.dataset.view));
for (const button of at("zoom").children) button.addEventListener("click", ZOOMS[button.dataset.zoom]);
for (const id of ["left", "right", "repeat"]) at(id).addEventListener("change", choosePair);
at("viewer-images").addEventListener("pointerdown", pointerDown);
at("viewer-images").addEventListener("pointermove", pointerMove);
at("viewer-images").addEventListener("pointerup", pointerUp);
at("viewer-images").addEventListener("pointercancel", pointerUp);
at("viewer-images").addEventListener("wheel", wheel, { passive: false });
at("viewer-images").addEventListener("dblclick", doubleClick);
addEventListener("resize", showZoom);
addEventListener("hashchange", readAddress);

fill(controls.set, named(data.sets.map((set) => set.name)), data.sets[0].name);
chooseSet(data.sets[0].name);
show();
readAddress();
