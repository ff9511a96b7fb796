// The page: shows what the server answers, sends verdicts, and says "saved" only when the server has it on its disk.
const find = (id) => element.querySelector("#" + id);
const make = (tag, className, text) => {
  const node = document.createElement(tag);
  if (className) node.className = className;
  if (text !== undefined) node.textContent = text;
  return node;
};
const VERDICTS = {
  steps: [
    { name: "right", sign: "✓", words: "Right", keys: ["1", "+"] },
    { name: "wrong", sign: "✕", words: "Wrong", keys: ["0", "-"] },
    { name: "neutral", sign: "○", words: "Nothing to check", keys: ["n"] },
    { name: "unsure", sign: "?", words: "Unsure", keys: ["u"] },
  ],
  questions: [
    { name: "keep", sign: "✓", words: "Keep", keys: ["1", "k"] },
    { name: "drop", sign: "✕", words: "Drop", keys: ["0", "x"] },
    { name: "unsure", sign: "?", words: "Unsure", keys: ["u"] },
  ],
};
const FAULT_KEYS = { l: "logical", m: "medical", i: "image_grounded" };
const FAULT_WORDS = { logical: "logic", medical: "medicine", image_grounded: "image" };
const ABOUT = [
  { name: "answer_right", words: "The answer", options: [[true, "a", "is right"], [false, "s", "is not"]] },
  { name: "difficulty", words: "Difficulty", options: [["easy", "e", "easy"], ["medium", "r", "medium"], ["hard", "t", "hard"]] },
];
const viewer = makeViewer(find);
let view = null, about = {}, busy = false, again = null, isWrong = false;

// Talking to the server

async function ask(call, after) {
  if (busy) return;
  busy = true;
  element.classList.add("busy");
  try {
    const answer = await call();
    if (!answer) throw new Error("no answer"); // Gradio's client logs a failed call and gives nothing
    find("lost").hidden = true;
    render(answer);
    if (answer.refused) say(answer.refused, "refused");
    else if (after) after(answer);
  } catch (error) {
    await explain(() => ask(call, after));
  } finally {
    busy = false;
    element.classList.remove("busy");
  }
}
async function explain(retry) {
  again = retry;
  const code = await fetch("/picture/-").then((r) => r.status, () => 0);
  find("lost-why").textContent =
    code === 401 ? "Your session has ended. Log in again: you go on where you stopped."
    : code === 0 ? "The server does not answer. What was saved before is safe."
    : "The server could not keep it. What was saved before is safe.";
  find("lost").hidden = false;
  find("retry").focus();
}
function submit(verdict) {
  const item = view && view.case;
  if (!item) return;
  const faults = verdict === "wrong" ? [...element.querySelectorAll("#faults input:checked")].map((box) => box.value) : [];
  const said = { item_id: item.item.item_id, verdict, faults, feedback: find("feedback").value, ...about };
  ask(() => server.submit(said), () => say("Saved: " + wordsOf(said)));
}
const move = (by) => view && view.case && ask(() => server.show({ item_id: view.case.item.item_id, by }));
const undo = () => ask(() => server.undo({}), () => say("Taken back"));

// Showing

function say(words, kind) {
  const said = find("said");
  said.textContent = words;
  said.className = "said " + (kind || "");
}
function wordsOf(said) {
  const { sign, words } = VERDICTS[view.what].find((v) => v.name === said.verdict);
  return [sign + " " + words, ...said.faults.map((f) => FAULT_WORDS[f])].join(", ");
}
function render(answer) {
  const before = view && view.case && view.case.item.item_id;
  view = answer;
  renderProgress();
  find("done").hidden = !!view.case;
  if (!view.case) return renderNothing();
  const item = view.case;
  find("question").textContent = item.question;
  find("options").replaceChildren(...item.options.map((option) => make("li", "", option)));
  find("answer").hidden = item.answer === null;
  find("answer").textContent = "Answer: " + item.answer + "   ·   difficulty: " + item.difficulty;
  viewer.show(item.pictures);
  viewer.prefetch(view.prefetch);
  renderSteps();
  renderDocuments(before !== item.item.item_id);
  renderOthers();
  renderOwn();
}
function renderProgress() {
  const p = view.progress, mine = p.done + p.left;
  find("who").textContent = view.reader + (view.adjudicates ? " · adjudicator" : "");
  find("meter").firstElementChild.style.width = (mine ? (100 * p.done) / mine : 100) + "%";
  find("meter").setAttribute("aria-valuenow", p.done);
  find("meter").setAttribute("aria-valuemax", mine);
  const time = p.minutes_left === null || p.done < 5 ? "" : " · about " + spell(p.minutes_left) + " left";
  find("mine").textContent = "you " + p.done + " of " + mine + time;
  find("all").textContent = "all: " + p.decided + " of " + p.total + " decided" + (p.disputed ? ", " + p.disputed + " disputed" : "");
}
function spell(minutes) {
  const whole = Math.max(1, Math.round(minutes));
  return whole < 60 ? whole + " min" : Math.floor(whole / 60) + " h " + (whole % 60) + " min";
}
function renderNothing() {
  const box = find("done").firstElementChild;
  box.children[0].textContent = view.progress.done ? "Nothing left for you. Thank you." : "Nothing to read yet.";
  box.children[1].textContent = view.adjudicates
    ? "Items appear here when two readers contradict each other."
    : "Other readers may still hold items, or give some back: reload to see. z takes your last verdict back.";
}
function renderSteps() {
  const { steps, step_index } = view.case;
  find("steps").hidden = !steps.length;
  find("steps").replaceChildren(
    ...steps.map((text, i) => {
      const step = make("div", i < step_index ? "before" : i > step_index ? "after" : "now");
      step.setAttribute("role", "listitem");
      if (i === step_index) step.setAttribute("aria-current", "step");
      step.append(make("b", "", i + 1), make("span", "", text));
      return step;
    }),
  );
  showNow();
}
function showNow() {
  const now = find("steps").querySelector(".now");
  if (now) now.scrollIntoView({ block: "center" });
}
function renderOthers() {
  const letters = "ABCD";
  find("others").hidden = !view.others.length;
  find("others").replaceChildren(
    ...view.others.map((said, i) => {
      const card = make("div", said.verdict);
      const right = said.answer_right === null ? "" : said.answer_right ? ", answer right" : ", answer wrong";
      card.append(make("b", "", "Reader " + letters[i] + ": " + wordsOf(said) + right));
      if (said.feedback) card.append(make("p", "", said.feedback));
      return card;
    }),
  );
}
function renderOwn() {
  const own = view.own;
  find("feedback").value = own ? own.feedback : "";
  for (const box of element.querySelectorAll("#faults input")) box.checked = !!own && own.faults.includes(box.value);
  about = view.what === "questions" ? { answer_right: own && own.answer_right, difficulty: own && own.difficulty } : {};
  find("mark").textContent = own ? "You said: " + wordsOf(own) : "";
  find("verdicts").replaceChildren(
    ...VERDICTS[view.what].map((verdict) => {
      const button = make("button", verdict.name);
      button.append(make("i", "", verdict.sign), make("span", "", verdict.words), make("kbd", "", verdict.keys[0]));
      button.setAttribute("aria-pressed", !!own && own.verdict === verdict.name);
      button.onclick = () => press(verdict.name);
      return button;
    }),
  );
  renderAbout();
  setWrong(!!own && own.verdict === "wrong");
}
function renderAbout() {
  find("about").hidden = view.what !== "questions";
  find("about").replaceChildren(
    ...ABOUT.map(({ name, words, options }) => {
      const row = make("div");
      row.setAttribute("role", "group");
      row.append(make("span", "", words));
      for (const [value, key, label] of options) {
        const button = make("button", "", label + " ");
        button.append(make("kbd", "", key));
        button.setAttribute("aria-pressed", about[name] === value);
        button.onclick = () => setAbout(name, value);
        row.append(button);
      }
      return row;
    }),
  );
}
function setAbout(name, value) {
  about[name] = about[name] === value ? null : value;
  renderAbout();
}
function setWrong(wrong) {
  isWrong = wrong;
  find("faults").hidden = !wrong;
  find("verdicts").classList.toggle("asking", wrong);
}
function press(verdict) {
  if (verdict === "wrong" && !isWrong) setWrong(true);
  else submit(verdict);
}

// Documents

function renderDocuments(isOther) {
  const passages = view.case.documents;
  find("documents-open").hidden = !passages.length;
  find("documents-open").replaceChildren(
    make("span", "", "Documents (" + passages.length + ")"), make("kbd", "", "d"));
  if (isOther) {
    find("search").value = "";
    setDocuments(false);
  }
  search();
}
function setDocuments(open) {
  find("documents").hidden = !open;
  find("documents-open").setAttribute("aria-expanded", open);
}
function search() {
  const words = find("search").value.toLowerCase().split(/\s+/).filter(Boolean);
  const hits = view.case.documents.filter(({ title, text }) =>
    words.every((word) => (title + " " + text).toLowerCase().includes(word)));
  find("found").textContent = words.length ? hits.length + " of " + view.case.documents.length : "";
  find("passages").replaceChildren(
    ...hits.map(({ title, text }) => {
      const article = make("article");
      const body = make("p");
      body.append(...marked(text, words));
      article.append(make("h2", "", title), body);
      return article;
    }),
  );
}
function marked(text, words) {
  if (!words.length) return [text];
  const pattern = words.map((word) => word.replace(/[^\p{L}\p{N}]/gu, "\\$&")).join("|");
  return text.split(new RegExp("(" + pattern + ")", "giu")).map((part, i) => (i % 2 ? make("mark", "", part) : part));
}

// Keys

const KEYS = [
  ["z", "take the last verdict back", undo],
  ["ArrowLeft", "the item before", () => move(-1)],
  ["ArrowRight", "the item after", () => move(1)],
  ["ArrowUp", "the picture before", () => viewer.next(-1)],
  ["ArrowDown", "the picture after", () => viewer.next(1)],
  ["PageUp", "zoom in (or the wheel)", viewer.zoomIn],
  ["PageDown", "zoom out", viewer.zoomOut],
  ["Home", "whole image, full window (double click: whole image)", viewer.reset],
  ["w", "next window preset (or drag with the right button)", viewer.nextPreset],
  ["v", "invert", viewer.invert],
  ["d", "documents", () => setDocuments(find("documents").hidden)],
  ["/", "search the documents", () => { setDocuments(true); find("search").focus(); }],
  ["f", "write feedback (Enter or Esc leaves it)", () => find("feedback").focus()],
  ["?", "these keys", () => setHelp(find("help").hidden)],
];
function setHelp(open) {
  const rows = [
    ...VERDICTS[view.what].map((v) => [v.keys.join(" or "), v.sign + " " + v.words]),
    ...(view.what === "steps" ? [["l m i", "what is wrong: logic, medicine, image; Enter saves"]]
      : ABOUT.map((row) => [row.options.map((o) => o[1]).join(" "), row.words + ": " + row.options.map((o) => o[2]).join(", ")])),
    ...KEYS.map(([key, words]) => [{ ArrowLeft: "←", ArrowRight: "→", ArrowUp: "↑", ArrowDown: "↓" }[key] || key, words]),
  ];
  find("keys").replaceChildren(make("h1", "", "Keys"), ...rows.map(([key, words]) => {
    const row = make("p");
    row.append(make("kbd", "", key), make("span", "", words));
    return row;
  }));
  find("help").hidden = !open;
}
function onKey(event) {
  if (!element.isConnected) return document.removeEventListener("keydown", onKey);
  if (event.ctrlKey || event.metaKey || event.altKey || !view || !find("lost").hidden) return;
  if (event.key === "Escape") return leave();
  if (event.target.matches("textarea") && event.key === "Enter" && !event.shiftKey) {
    event.target.blur(); // else the next verdict's key would be typed into it
    return take(event, () => isWrong && submit("wrong"));
  }
  if (event.target.matches("input[type=search], textarea")) return;
  if (event.key === "Enter" && isWrong && !event.target.matches("button, label")) return take(event, () => submit("wrong"));
  if (isWrong && FAULT_KEYS[event.key]) {
    const box = element.querySelector("#faults input[value=" + FAULT_KEYS[event.key] + "]");
    return take(event, () => (box.checked = !box.checked));
  }
  const verdict = VERDICTS[view.what].find((v) => v.keys.includes(event.key));
  if (verdict) return take(event, () => event.repeat || press(verdict.name));
  for (const { name, options } of view.what === "questions" ? ABOUT : [])
    for (const [value, key] of options) if (key === event.key) return take(event, () => setAbout(name, value));
  const command = KEYS.find(([key]) => key === event.key);
  if (command) take(event, command[2]);
}
function take(event, act) {
  event.preventDefault();
  act();
}
function leave() {
  document.activeElement.blur();
  if (!find("help").hidden) return setHelp(false);
  if (!find("documents").hidden) return setDocuments(false);
  if (isWrong) setWrong(false);
}
document.addEventListener("keydown", onKey);
new ResizeObserver(showNow).observe(find("steps"));
find("search").oninput = search;
find("documents-open").onclick = () => setDocuments(find("documents").hidden);
find("documents-close").onclick = () => setDocuments(false);
find("help-open").onclick = () => setHelp(true);
find("help").onclick = () => setHelp(false);
find("save-wrong").onclick = () => submit("wrong");
find("back").onclick = () => move(-1);
find("forward").onclick = () => move(1);
find("undo").onclick = undo;
find("retry").onclick = () => { find("lost").hidden = true; again(); };
ask(() => server.show({}));
