// The page holds no data: it asks for ids and words, and shows words as text only.
"use strict";

const REASONS = [
  ["no_instruction", "no search instruction", "speaks to its reader, names files, holds markup"],
  ["untrue", "untrue", "says what can't be seen there"],
  ["describes_source", "describes the left one", "asks for what is only in the left picture"],
  ["wrong_target", "not the right one", "asks for what the right picture doesn't show"],
  ["gives_away", "gives it away", "describes the right picture in full"],
  ["vague", "vague", "would suit nearly any picture"],
];
const at = (id) => document.getElementById(id);
let items = [], place = 0, verdict = null, history = [], busy = false;

function show() {
  const judged = items.filter((item) => item.verdict).length;
  at("place").textContent = `${judged} of ${items.length} judged`;
  at("bar").style.width = `${(100 * judged) / Math.max(1, items.length)}%`;
  const rail = at("bar").parentElement;
  rail.setAttribute("aria-valuemax", items.length);
  rail.setAttribute("aria-valuenow", judged);
  const item = items[place];
  at("main").hidden = !item;
  at("done").hidden = Boolean(item);
  at("reasons").hidden = !verdict;
  at("verdicts").hidden = Boolean(verdict);
  if (!item) {
    const count = (name) => items.filter((one) => one.verdict === name).length;
    at("sum").textContent = `${count("fits")} fit, ${count("partly")} fit partly, ${count("wrong")} are wrong.`;
    return;
  }
  for (const side of ["query", "target"]) {
    const image = at(side), source = `picture/${item[side]}`;
    if (!image.src.endsWith(source)) {
      image.className = image.parentElement.className = "";
      image.parentElement.className = "mat";
      image.src = source;
    }
  }
  at("instruction").textContent = item.instruction;
}

function next(from) {
  const order = [...items.keys()].map((n) => (from + n) % Math.max(1, items.length));
  const open = order.find((n) => !items[n].verdict);
  place = open === undefined ? items.length : open;
}

async function send(item, said, reason) {
  const answer = await fetch("verdict", {
    method: "POST",
    headers: { "Content-Type": "application/json" },
    body: JSON.stringify({ item: item.item, verdict: said, reason }),
  });
  if (!answer.ok) throw new Error(`the server answered ${answer.status}`);
}

async function judge(said, reason) {
  const item = items[place];
  if (!item || busy) return;
  busy = true;
  try {
    await send(item, said, reason);
    item.verdict = said;
    item.reason = reason;
    if (said) history.push(place);
    tell(said ? `${said}${reason && reason !== "none" ? `, ${reason.replace(/_/g, " ")}` : ""}` : "taken back");
    verdict = null;
    if (said) next(place);
  } catch (error) {
    tell(`not saved: ${error.message}`, true);
  }
  busy = false;
  show();
}

function tell(text, failed = false) {
  at("said").textContent = text;
  at("said").className = failed ? "failed" : "";
}

async function undo() {
  if (verdict) { verdict = null; show(); return; }
  if (busy || !history.length) return;
  place = history.pop();
  await judge(null, "none");
}

function skip() {
  if (busy || !items[place]) return;
  verdict = null;
  next(place + 1);
  tell("skipped");
  show();
}

function choose(said) {
  if (said === "fits") judge("fits", "none");
  else { verdict = said; show(); }
}

function pressed(event) {
  if (event.ctrlKey || event.altKey || event.metaKey || event.repeat) return;
  const key = event.key.toLowerCase(), number = Number(key);
  if (key === "u" || key === "backspace") undo();
  else if (key === "s") skip();
  else if (key === "escape") { verdict = null; show(); }
  else if (verdict && number >= 1 && number <= REASONS.length) judge(verdict, REASONS[number - 1][0]);
  else if (!verdict && number >= 1 && number <= 3 && items[place]) choose(["fits", "partly", "wrong"][number - 1]);
  else return;
  event.preventDefault();
}

async function start() {
  for (const [number, [code, name, meaning]] of REASONS.entries()) {
    const button = document.createElement("button"), key = document.createElement("kbd"), small = document.createElement("small");
    button.type = "button";
    key.textContent = number + 1;
    small.textContent = meaning;
    button.append(key, ` ${name}`, small);
    button.addEventListener("click", () => judge(verdict, code));
    at("reasons").append(button);
  }
  for (const button of at("verdicts").children) button.addEventListener("click", () => choose(button.dataset.verdict));
  for (const side of ["query", "target"]) {
    at(side).addEventListener("error", () => { at(side).className = "gone"; at(side).parentElement.className = "mat gone"; });
  }
  document.addEventListener("keydown", pressed);
  try {
    const answer = await fetch("items");
    if (!answer.ok) throw new Error(`the server answered ${answer.status}`);
    const given = await answer.json();
    items = given.items;
    at("who").textContent = given.who;
    next(0);
    show();
  } catch (error) {
    tell(error.message, true);
  }
}

start();
