// SPDX-License-Identifier: Apache-2.0
// The page: sends prompts, shows answers as they come, stops them, and keeps all of it over a reload.

import { receive } from "./answer.js";
import { ExchangeView, messages } from "./conversation.js";
import { Engine } from "./engine.js";
import { apiKey, withKey } from "./key.js";
import { call, ServerError } from "./server.js";
import { Settings } from "./settings.js";
import { load, save } from "./store.js";

const TEXTS = {
  chat: {
    title: "Ask the model something",
    text: "The answer appears token by token, and you can stop it at any time.",
    placeholder: (name) => `Message ${name}`,
    suggestions: ["What is the capital of Japan?", "Write a haiku about light.", "Show me bubble sort in Python."],
  },
  completion: {
    title: "Begin a text, and the model goes on",
    text: "The model gets your text as it is, without a chat template.",
    placeholder: () => "Text to continue",
    suggestions: ["The capital of Japan is", "Once upon a time, in a town by the sea,", "def fibonacci(n):"],
  },
};
const NOTHING_YET = { answer: "", reasoning: "", tokens: 0, firstMs: undefined, rate: undefined, finish: "", error: "" };
const NEAR_BOTTOM = 60; // pixels; a reader who has scrolled up further is left there

const [scroller, conversation, composer, prompt] = ["scroller", "conversation", "composer", "prompt"].map(element);
const modes = element("modes");
const hasTouch = matchMedia("(pointer: coarse)").matches;
const settings = new Settings(element("settings"));
const engine = new Engine({ key: apiKey, onStatus: offerChat });
const kept = load("page", {});
const exchanges = { chat: (kept.chat ?? []).map(interrupted), completion: (kept.completion ?? []).map(interrupted) };
let mode = kept.mode ?? "chat";
let model = "";
let running = null; // the AbortController of the answer that is coming
let isAtBottom = true;

// An exchange as it was kept; an answer that was coming then has ended with its page.
function interrupted({ busy, ...exchange }) {
  return busy ? { ...exchange, finish: "cancelled" } : exchange;
}

function keep() {
  save("page", { mode, draft: prompt.value, ...exchanges });
}

function showMode() {
  const { title, text, placeholder, suggestions } = TEXTS[mode];
  modes.querySelector(`[value=${mode}]`).checked = true;
  element("welcome-title").textContent = title;
  element("welcome-text").textContent = text;
  element("suggestions").replaceChildren(...suggestions.map(suggestion));
  element("system-setting").hidden = mode !== "chat";
  prompt.placeholder = placeholder(model);
  conversation.replaceChildren();
  exchanges[mode].forEach(append);
  isAtBottom = true;
  refresh();
}

function suggestion(text) {
  const item = document.createElement("li");
  const button = item.appendChild(document.createElement("button"));
  button.type = "button";
  button.textContent = text;
  button.addEventListener("click", () => send(text));
  return item;
}

function append(exchange) {
  const view = new ExchangeView(exchange, { onRetry: () => running || run(view) });
  conversation.append(view.root);
  return view;
}

// What follows from the state: which buttons are there, whether the page is still empty.
function refresh() {
  element("send").hidden = Boolean(running);
  element("stop").hidden = !running;
  modes.disabled = Boolean(running);
  element("welcome").hidden = exchanges[mode].length > 0;
  element("clear").disabled = exchanges[mode].length === 0;
  prompt.style.height = "auto";
  prompt.style.height = `${prompt.scrollHeight}px`;
}

async function send(text) {
  if (running || !text.trim()) return;
  const exchange = { mode, prompt: text, ...NOTHING_YET };
  exchanges[mode].push(exchange);
  isAtBottom = true;
  await run(append(exchange));
}

async function run(view) {
  const { exchange } = view;
  const controller = (running = new AbortController());
  Object.assign(exchange, NOTHING_YET, { busy: true });
  view.update();
  refresh();
  keep();
  try {
    await withKey(async () => {
      model ||= await firstModel();
      const onToken = (isToken) => {
        if (isToken) engine.addToken();
        engine.showAnswer(exchange);
        view.updateSoon();
      };
      await receive(exchange, { key: apiKey(), body: body(exchange), signal: controller.signal, onToken });
    });
  } catch (error) {
    if (controller.signal.aborted) exchange.finish = "cancelled";
    else exchange.error = error.message;
    if (!controller.signal.aborted && !(error instanceof ServerError)) console.error(error);
  }
  exchange.busy = false;
  running = null;
  view.update();
  refresh();
  keep();
  if (!hasTouch) prompt.focus();
}

function body(exchange) {
  const said = exchange.mode === "chat" ? { messages: messages(exchanges.chat, settings.system) } : { prompt: exchange.prompt };
  return { model, ...said, ...settings.parameters() };
}

async function firstModel() {
  const { data } = await (await call("v1/models", { key: apiKey() })).json();
  const name = data[0].id;
  element("model").textContent = name;
  prompt.placeholder = TEXTS[mode].placeholder(name);
  return name;
}

function offerChat({ chat }) {
  if (chat !== false) return;
  modes.querySelector("[value=chat]").disabled = true;
  modes.title = "The model has no chat template";
  if (mode === "chat" && !running) {
    mode = "completion";
    showMode();
  }
}

function element(id) {
  return document.getElementById(id);
}

composer.addEventListener("submit", (event) => {
  event.preventDefault();
  if (running || !prompt.value.trim()) return;
  const text = prompt.value;
  prompt.value = "";
  send(text);
});
prompt.addEventListener("input", refresh);
prompt.addEventListener("keydown", (event) => {
  const sends = event.key === "Enter" && !event.shiftKey && !event.isComposing && !hasTouch;
  if (!sends) return;
  event.preventDefault();
  composer.requestSubmit();
});
element("stop").addEventListener("click", () => running?.abort());
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape" && !document.querySelector("dialog[open], :popover-open")) running?.abort();
});
element("clear").addEventListener("click", () => {
  running?.abort();
  exchanges[mode] = [];
  showMode();
  keep();
  prompt.focus();
});
modes.addEventListener("change", (event) => {
  mode = event.target.value;
  showMode();
  keep();
});
scroller.addEventListener("scroll", () => {
  isAtBottom = scroller.scrollHeight - scroller.scrollTop - scroller.clientHeight < NEAR_BOTTOM;
});
const follow = new ResizeObserver(() => isAtBottom && scroller.scrollTo(0, scroller.scrollHeight));
follow.observe(conversation);
follow.observe(scroller);
window.addEventListener("beforeunload", () => running?.abort()); // else a reload looks like a broken connection
window.addEventListener("pagehide", keep);
document.addEventListener("visibilitychange", keep);
matchMedia("(min-width: 60rem)").addEventListener("change", () => element("panel").hidePopover());

prompt.value = kept.draft ?? "";
showMode();
withKey(async () => (model = await firstModel())).catch(() => {}); // told when something is sent
if (!hasTouch) prompt.focus();
