"use strict";
// A client of the service's own API: what it shows is what /v1/rerank, /v1/best_of_n and /v1/tile_maps answer.
const $ = (id) => document.getElementById(id);
const AGGREGATES = { min: "worst step", mean: "mean of the steps", last: "last step" };
const RULES = { best_of_n: "Best of N", sc_rm: "Sum of rewards", majority: "Most votes" };
let image = null; // base64
let answer = null; // the last ranking
let sentCase = null; // the case that it is about
let maps = new Map(); // by solution: what /v1/tile_maps answers of it
let shown = null; // the step whose overlay is drawn: { found, i, wanted }
let aggregate = "min";

const element = (tag, text = "", properties = {}) => Object.assign(document.createElement(tag), { textContent: text }, properties);
const lines = (id) => $(id).value.split("\n").map((line) => line.trim()).filter(Boolean);
const signed = (value) => (value >= 0 ? "+" : "−") + Math.abs(value).toFixed(2);
const percent = (value) => (value > 0.995 && value < 1 ? ">99" : value < 0.005 && value > 0 ? "<1" : (100 * value).toFixed(0)) + " %";

function say(text, isFault = false) {
  $("status").textContent = text;
  $("status").classList.toggle("fault", isFault);
}

async function call(path, body) {
  const headers = { "Content-Type": "application/json" };
  if ($("key").value) headers.Authorization = "Bearer " + $("key").value;
  let reply;
  try {
    reply = await fetch(path, { method: body ? "POST" : "GET", headers, body: body && JSON.stringify(body) });
  } catch {
    throw new Error("The service does not answer. Try again.");
  }
  if (reply.ok) return reply;
  const problem = await reply.json().catch(() => ({}));
  if (reply.status === 401) {
    $("key-fold").open = true;
    $("key").focus();
  }
  throw new Error(problem.detail || `The service answered ${reply.status}.`);
}

// The form

function addSolution(text = "") {
  const one = element("div", "", { className: "one" });
  const number = $("solutions").children.length + 1;
  const area = element("textarea", "", { value: text, rows: 4 });
  area.setAttribute("aria-label", `solution ${number}`);
  const remove = element("button", "✕", { type: "button", title: "Remove this solution" });
  remove.setAttribute("aria-label", `remove solution ${number}`);
  remove.onclick = () => one.remove();
  one.append(area, remove);
  $("solutions").append(one);
  return area;
}

// Results of another case must not stand beside this one's image.
function reset() {
  answer = null;
  clear();
  forgetAttention();
  for (const part of document.querySelectorAll(".scored, #evidence, #warnings")) part.hidden = true;
  for (const id of ["answer", "cards"]) $(id).replaceChildren();
  $("hint").hidden = false;
  $("map-says").textContent = "";
  say("");
}

function setImage(base64) {
  reset();
  image = base64;
  $("no-image").hidden = !base64;
  $("figure").hidden = !base64;
  if (base64) $("picture").src = "data:image;base64," + base64;
}

$("image").onchange = () => {
  const [file] = $("image").files;
  if (!file) return;
  const reader = new FileReader();
  reader.onload = () => setImage(reader.result.split(",")[1]);
  reader.readAsDataURL(file);
};
$("no-image").onclick = () => {
  $("image").value = "";
  setImage(null);
};
$("add").onclick = () => addSolution().focus();
const countDocuments = () => ($("num-documents").textContent = documents().length || "none");
const documents = () => $("documents").value.split(/\n\s*\n/).map((text) => text.trim()).filter(Boolean);
$("documents").oninput = countDocuments;
for (const way of document.querySelectorAll("[name=way]")) {
  way.onchange = () => {
    const sampled = $("way-sampled").checked;
    $("typed").hidden = sampled;
    $("sampled").hidden = !sampled;
    $("go").textContent = sampled ? "Sample and score" : "Score";
  };
}

function fill(example) {
  $("question").value = example.question;
  $("options").value = example.options.join("\n");
  $("documents").value = example.documents.join("\n\n");
  countDocuments();
  $("solutions").replaceChildren();
  for (const steps of example.solutions) addSolution(steps.join("\n"));
  $("image").value = "";
  setImage(example.image);
}

const solutionOf = (text) => (/^\s*step\s+\d+/i.test(text) ? text : text.split("\n").map((line) => line.trim()).filter(Boolean));

function readCase() {
  const options = lines("options");
  const shared = { question: $("question").value.trim(), options, documents: documents(), answer_type: options.length ? "choice" : "open" };
  if (image) shared.image = image;
  return shared;
}

// Scoring

$("form").onsubmit = async (event) => {
  event.preventDefault();
  $("go").disabled = true;
  say("Scoring …");
  try {
    const shared = readCase();
    sentCase = shared;
    maps = new Map();
    forgetAttention();
    if ($("way-sampled").checked) await sample(shared);
    else {
      const solutions = [...document.querySelectorAll("#solutions textarea")].map((area) => area.value).filter((text) => text.trim()).map(solutionOf);
      if (!solutions.length) throw new Error("There is no solution to score: type one, or have the policy sample some.");
      const started = performance.now();
      answer = await (await call("v1/rerank", { ...shared, solutions })).json();
      say(`${solutions.length} solutions in ${((performance.now() - started) / 1000).toFixed(1)} s.`);
      show(choicesOf(answer));
    }
    $("results").scrollIntoView({ behavior: "smooth", block: "start" });
  } catch (error) {
    say(error.message, true);
  }
  $("go").disabled = false;
};

const choicesOf = (ranking) => Object.keys(RULES).map((rule) => ({ rule, ...ranking[rule] }));

async function sample(shared) {
  const limits = { num_samples: +$("num-samples").value, reliability: +$("reliability").value / 100, stream: true };
  const reply = await call("v1/best_of_n", { ...shared, ...limits });
  const reader = reply.body.pipeThrough(new TextDecoderStream()).getReader();
  let buffer = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) break;
    buffer += value;
    const events = buffer.split("\n\n");
    buffer = events.pop();
    for (const event of events) take(event);
  }
}

function take(event) {
  const [name, data] = event.split("\n").map((line) => line.replace(/^(event|data): /, ""));
  const message = JSON.parse(data);
  if (name === "problem") throw new Error(message.detail);
  const sure = `${percent(message.reliability)} sure to stay`;
  const tokens = message.cost.policy.completion_tokens.toLocaleString("en") + " tokens sampled";
  if (name === "round") {
    say(`${message.num_drawn} samples: ${message.choice.answer ?? "no answer"} so far, ${sure}; ${tokens} …`);
    return;
  }
  const why = { settled: "more could not change it", reliable: "sure enough", exhausted: "all drawn" }[message.stopped];
  say(`${message.num_drawn} of ${message.num_samples} samples (${why}), ${sure}; ${tokens}.`);
  if (!message.ranking) throw new Error("None of the samples could be scored: " + Object.entries(message.rejected).map(([kind, count]) => `${count} ${kind}`).join(", "));
  answer = message.ranking;
  show(choicesOf(answer));
}

// Results

function show(choices) {
  $("hint").hidden = true;
  for (const part of document.querySelectorAll(".scored")) part.hidden = false;
  if (sentCase.image) $("map-says").textContent = "Choose a step to see where the model looked.";
  clear();
  const boxes = choices.map(({ rule, answer: letter, support }, i) => {
    const box = element("div", "", { className: i ? "" : "main" });
    const value = rule === "best_of_n" ? `reward ${percent(support)}` : `${percent(support)} of the ${rule === "majority" ? "votes" : "rewards"}`;
    box.append(element("span", RULES[rule], { className: "quiet" }), element("b", nameOf(letter)), element("span", value, { className: "quiet" }));
    return box;
  });
  $("answer").replaceChildren(...boxes);
  showAggregates();
  showOrder();
  $("evidence").hidden = !sentCase.documents.length;
  $("evidence").firstElementChild.textContent = `Evidence: ${sentCase.documents.length} documents that were read`;
  $("evidence").lastElementChild.replaceChildren(...sentCase.documents.map((text) => element("li", text)));
  $("warnings").hidden = !answer.warnings.length;
  $("warnings").replaceChildren(...answer.warnings.map((text) => element("li", text)));
}

function nameOf(letter) {
  const option = letter && sentCase.options["ABCDEFGHIJKLMNOPQRSTUVWXYZ".indexOf(letter)];
  return option ? `(${letter}) ${option}` : letter || "no answer";
}

const orderBy = (how) => answer.solutions.filter((s) => s.rank !== null).sort((a, b) => b.aggregates[how] - a.aggregates[how] || a.rank - b.rank);

function showAggregates() {
  const legend = element("legend", "Reward of a solution");
  const radios = Object.entries(AGGREGATES).map(([how, words]) => {
    const label = element("label");
    const radio = element("input", "", { type: "radio", name: "aggregate", value: how, checked: how === aggregate });
    radio.onchange = () => {
      aggregate = how;
      showOrder();
    };
    label.append(radio, " " + words);
    return label;
  });
  $("aggregates").replaceChildren(legend, ...radios);
}

function showOrder() {
  const reference = orderBy(aggregate).map((s) => s.index);
  const rows = Object.entries(AGGREGATES).map(([how, words]) => {
    const row = element("tr", "", { className: how === aggregate ? "now" : "" });
    const cell = element("td");
    orderBy(how).slice(0, 12).forEach(({ index }, place) => {
      const moved = reference[place] !== index;
      cell.append(place ? " › " : "", element("span", String(index + 1), { className: moved ? "moved" : "", title: moved ? "another place than by the aggregate that is chosen" : "" }));
    });
    row.append(element("th", words, { scope: "row" }), cell);
    return row;
  });
  $("orders").tBodies[0].replaceChildren(...rows);
  const failed = answer.solutions.filter((s) => s.rank === null);
  $("cards").replaceChildren(...[...orderBy(aggregate), ...failed].map(card));
}

function card(solution, place) {
  const box = element("details", "", { className: "card", open: place < 2 });
  const head = element("summary");
  head.append(element("b", `${solution.rank === null ? "–" : place + 1}. Solution ${solution.index + 1}`), element("span", nameOf(solution.answer)));
  if (solution.rank !== null) head.append(element("span", `reward ${percent(solution.aggregates[aggregate])}`, { className: "reward" }));
  const steps = element("div", "", { className: "steps" });
  if (solution.error) steps.append(element("p", `Not scored: ${solution.error}`));
  const largest = Math.max(1, ...answer.solutions.flatMap((s) => s.steps.map((step) => Math.abs(step.image_log_odds))));
  solution.steps.forEach((step, i) => steps.append(stepButton(solution, step, i, largest)));
  box.append(head, steps);
  return box;
}

function stepButton(solution, step, i, largest) {
  const button = element("button", "", { type: "button", className: "step" });
  const isRight = step.probability >= 0.5;
  // Grey at a half, full colour where the model is sure.
  const share = Math.round(Math.abs(step.probability - 0.5) * 200);
  button.style.setProperty("--own", `color-mix(in srgb, var(--${isRight ? "right" : "wrong"}) ${share}%, #8d97a2)`);
  const p = element("span", "", { className: "p" });
  p.append(element("i", isRight ? "✓ " : "✕ "), percent(step.probability));
  button.append(p, element("span", step.text));
  if (sentCase.image) button.append(imagePart(step.image_log_odds, largest));
  button.setAttribute("aria-pressed", "false");
  button.onclick = () => look(solution, i, button);
  return button;
}

function imagePart(value, largest) {
  const part = element("span", "", { className: "image-part" });
  const bar = element("span", "", { className: "bar" });
  bar.setAttribute("aria-hidden", "true");
  const fill = element("i");
  const width = (50 * Math.abs(value)) / largest;
  fill.style.width = width + "%";
  fill.style.left = (value >= 0 ? 50 : 50 - width) + "%";
  fill.style.background = `var(--${value >= 0 ? "right" : "wrong"})`;
  bar.append(fill);
  part.append(element("span", `image ${signed(value)}`), bar);
  part.title = "what the image adds to the step's log-odds";
  return part;
}

// Arrow keys walk through the steps.
$("cards").onkeydown = (event) => {
  const by = { ArrowDown: 1, ArrowUp: -1 }[event.key];
  if (!by || !event.target.classList.contains("step")) return;
  const buttons = [...document.querySelectorAll("details[open] > .steps > .step")];
  const next = buttons[buttons.indexOf(event.target) + by];
  if (!next) return;
  event.preventDefault();
  next.focus();
  next.click();
};

// Where the model looked

async function look(solution, i, button) {
  for (const other of document.querySelectorAll(".step[aria-pressed=true]")) other.setAttribute("aria-pressed", "false");
  button.setAttribute("aria-pressed", "true");
  if (!sentCase.image) return;
  const wanted = `Step ${i + 1} of solution ${solution.index + 1}`;
  try {
    if (!maps.has(solution.index)) {
      $("map-says").textContent = `${wanted}: looking …`;
      maps.set(solution.index, mapsOf(solution));
    }
    const found = await maps.get(solution.index);
    if (button.getAttribute("aria-pressed") === "true") draw({ found, i, wanted });
  } catch (error) {
    maps.delete(solution.index);
    $("map-says").textContent = error.message;
  }
}

async function mapsOf(solution) {
  const { answer_type, ...shared } = sentCase;
  const reply = await call("v1/tile_maps", { ...shared, solutions: [solution.steps.map((step) => step.text)] });
  const { solutions, attention } = await reply.json();
  return { tiles: solutions[0].maps, attention: attention && { area: attention.area, steps: attention.solutions[0] } };
}

// The switch between what changes the score and where the attention lies.
const view = () => document.querySelector("[name=view]:checked").value;
const attentionRadio = document.querySelector("[name=view][value=attention]");
for (const radio of document.querySelectorAll("[name=view]")) radio.onchange = () => shown && draw(shown);

function forgetAttention() {
  shown = null;
  offerAttention(false, "known once a step is chosen");
}

function offerAttention(isOffered, whyNot) {
  attentionRadio.disabled = !isOffered;
  $("no-attention").textContent = isOffered ? "" : whyNot;
  if (!isOffered) document.querySelector("[name=view][value=tiles]").checked = true;
}

function draw(step) {
  shown = step;
  const { found, i, wanted } = step;
  offerAttention(found.attention !== null, "this model reads an image as one token, not in patches");
  const isAttention = view() === "attention";
  $("of-tiles").hidden = isAttention;
  $("of-attention").hidden = !isAttention;
  if (isAttention) drawAttention(found.attention.steps[i], found.attention.area, wanted);
  else drawTiles(found.tiles[i], wanted);
}

function drawTiles(map, wanted) {
  const values = map.flat();
  const strongest = Math.max(...values.map(Math.abs));
  paint(map, [0, 0, 1, 1], (value) => [...(value >= 0 ? [111, 183, 234] : [240, 149, 63]), strongest ? Math.abs(value) / strongest : 0]);
  const most = values.indexOf(values.reduce((a, b) => (Math.abs(b) > Math.abs(a) ? b : a)));
  $("map-says").textContent = strongest < 0.005
    ? `${wanted}: no part of the image changes its score.`
    : `${wanted}: most at the ${spot(map, most, [0, 0, 1, 1])} of the picture; hiding that tile changes the step by ${signed(-values[most])} log-odds.`;
}

function drawAttention({ weights, share }, area, wanted) {
  const values = weights.flat();
  const strongest = Math.max(...values);
  paint(weights, area, (value) => [232, 215, 96, strongest ? value / strongest : 0]);
  const most = values.indexOf(strongest);
  $("map-says").textContent = `${wanted}: most attention at the ${spot(weights, most, area)} of the picture, ${percent(values[most])} of what lies on its patches. They have ${percent(share)} of the whole attention.`;
}

// A grid over an area of the picture (left, top, right, bottom, as shares of it); a colour has its strength, 0 to 1, last.
function paint(grid, area, colourOf) {
  const canvas = $("overlay");
  const [rows, columns] = [grid.length, grid[0].length];
  [canvas.height, canvas.width] = [rows, columns];
  const context = canvas.getContext("2d");
  const pixels = context.createImageData(columns, rows);
  grid.flat().forEach((value, i) => {
    const [red, green, blue, strength] = colourOf(value);
    pixels.data.set([red, green, blue, 255 * strength], 4 * i);
  });
  context.putImageData(pixels, 0, 0);
  canvas.area = area;
  place();
}

function spot(grid, place, [left, top, right, bottom]) {
  const [rows, columns] = [grid.length, grid[0].length];
  const x = left + ((right - left) * ((place % columns) + 0.5)) / columns;
  const y = top + ((bottom - top) * (Math.floor(place / columns) + 0.5)) / rows;
  const third = (share) => Math.min(2, Math.max(0, Math.floor(3 * share)));
  const where = [["upper", "middle", "lower"][third(y)], ["left", "middle", "right"][third(x)]];
  return where[0] === where[1] ? "middle" : where.join(" ");
}

const clear = () => $("overlay").getContext("2d").clearRect(0, 0, 64, 64);

// The overlay lies on the picture itself, not on the bars beside it.
function place() {
  const { naturalWidth, naturalHeight, clientWidth, clientHeight, offsetLeft, offsetTop } = $("picture");
  if (!naturalWidth) return;
  const scale = Math.min(clientWidth / naturalWidth, clientHeight / naturalHeight);
  const [width, height] = [naturalWidth * scale, naturalHeight * scale];
  const [left, top, right, bottom] = $("overlay").area || [0, 0, 1, 1];
  const style = $("overlay").style;
  style.width = width * (right - left) + "px";
  style.height = height * (bottom - top) + "px";
  style.left = offsetLeft + (clientWidth - width) / 2 + width * left + "px";
  style.top = offsetTop + (clientHeight - height) / 2 + height * top + "px";
}
const fade = () => ($("overlay").style.opacity = $("opacity").value / 100);
$("opacity").oninput = fade;
addEventListener("resize", place);
$("picture").onload = () => {
  clear();
  place();
};

// Start

(async () => {
  fade();
  addSolution();
  try {
    const { examples, model, has_policy: hasPolicy } = await (await call("demo/examples")).json();
    $("model").textContent = model;
    $("way-sampled").disabled = !hasPolicy;
    if (!hasPolicy) $("way-sampled").parentElement.append(element("span", " (no policy is served)", { className: "quiet" }));
    examples.forEach((example, i) => $("example").append(element("option", example.title, { value: i })));
    $("example").onchange = () => $("example").value && fill(examples[$("example").value]);
    if (examples.length) {
      $("example").value = 0;
      fill(examples[0]);
    }
  } catch (error) {
    say(error.message, true);
  }
})();
