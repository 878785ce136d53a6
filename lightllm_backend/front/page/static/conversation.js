// SPDX-License-Identifier: Apache-2.0
// The exchanges of the page and how they are shown. An exchange is plain data, so that it can be kept:
// { mode, prompt, answer, reasoning, finish, error, tokens, firstMs, rate }.

import { count, duration } from "./engine.js";
import { render } from "./markdown.js";

const ENDINGS = { length: "ended at max tokens", cancelled: "stopped", content_filter: "filtered", tool_calls: "asks for a tool" };

// One exchange on the page. onRetry(): asks the same once more.
export class ExchangeView {
  constructor(exchange, { onRetry }) {
    this.exchange = exchange;
    this.root = node("article", `exchange ${exchange.mode}`);
    this.given = node("div", "given", exchange.prompt);
    this.reasoning = node("details", "reasoning");
    this.thoughts = node("div", "thoughts");
    this.reasoning.append(node("summary", "", "Reasoning"), this.thoughts);
    this.answer = node("div", exchange.mode === "chat" ? "answer markdown" : "answer");
    this.failure = node("p", "failure");
    this.failure.setAttribute("role", "alert");
    this.facts = node("span", "facts");
    this.copy = button("Copy", () => this.copyAnswer());
    this.retry = button("Try again", onRetry);
    this.retry.classList.add("retry"); // of the last exchange alone (page.css)
    const foot = node("footer", "foot");
    foot.append(this.facts, this.copy, this.retry);
    if (exchange.mode === "chat") {
      this.root.append(node("h2", "hidden", "You"), this.given, node("h2", "hidden", "Model"), this.reasoning, this.answer);
    } else {
      const text = node("div", "text");
      text.append(this.given, this.answer);
      this.root.append(node("h2", "hidden", "Completion"), text);
    }
    this.root.append(this.failure, foot);
    this.update();
  }

  // Draws at the next frame, however many tokens come until then.
  updateSoon() {
    this.frame ??= requestAnimationFrame(() => this.update());
  }

  update() {
    cancelAnimationFrame(this.frame);
    this.frame = undefined;
    const { mode, answer, reasoning, error, busy } = this.exchange;
    this.root.setAttribute("aria-busy", Boolean(busy));
    this.root.classList.toggle("waiting", Boolean(busy && !answer && !reasoning));
    this.reasoning.hidden = !reasoning;
    this.reasoning.open = this.reasoning.open || Boolean(busy && reasoning && !answer);
    if (this.thoughts.textContent !== reasoning) this.thoughts.textContent = reasoning;
    if (mode === "chat") render(this.answer, answer);
    else this.answer.textContent = answer;
    this.failure.hidden = !error;
    if (this.failure.textContent !== error) this.failure.textContent = error ?? "";
    this.facts.textContent = facts(this.exchange).join(" · ");
    this.copy.hidden = busy || !answer || !navigator.clipboard; // browsers offer it to secure origins only
    this.retry.hidden = Boolean(busy);
  }

  async copyAnswer() {
    await navigator.clipboard.writeText(this.exchange.answer);
    this.copy.textContent = "Copied";
    setTimeout(() => (this.copy.textContent = "Copy"), 1500);
  }
}

// The messages of a chat: the system prompt, what was answered before, and what is asked now.
export function messages(exchanges, system) {
  const said = exchanges.flatMap(({ prompt, answer }, index) => {
    const isLast = index === exchanges.length - 1;
    if (!answer && !isLast) return []; // it failed, and many chat templates want the roles to alternate
    return [{ role: "user", content: prompt }, ...(isLast ? [] : [{ role: "assistant", content: answer }])];
  });
  return [...(system ? [{ role: "system", content: system }] : []), ...said];
}

function facts({ tokens, rate, firstMs, finish }) {
  return [
    tokens ? `${count(tokens)} ${tokens === 1 ? "token" : "tokens"}` : "",
    rate ? `${rate.toFixed(1)} tokens/s` : "",
    firstMs === undefined ? "" : `first token ${duration(firstMs)}`,
    ENDINGS[finish] ?? "",
  ].filter(Boolean);
}

function node(name, className, text = "") {
  const made = document.createElement(name);
  if (className) made.className = className;
  made.textContent = text;
  return made;
}

function button(text, onClick) {
  const made = node("button", "link", text);
  made.type = "button";
  made.addEventListener("click", onClick);
  return made;
}
