// SPDX-License-Identifier: Apache-2.0
// The panel's live figures: the engine's load, asked once a second while the page is visible, and this page's tokens.

import { Chart } from "./chart.js";
import { call } from "./server.js";

const INTERVAL_MS = 1000;
const STATES = new Map([[true, "ready"], [false, "not ready"]]);

export class Engine {
  // key(): the API key to ask with. onStatus: called with each status.
  constructor({ key, onStatus }) {
    this.key = key;
    this.onStatus = onStatus;
    this.tokens = 0;
    this.firstMs = 0;
    this.charts = {
      running: new Chart(element("running-chart"), { top: 4 }),
      queued: new Chart(element("queued-chart"), { top: 4 }),
      kv: new Chart(element("kv-chart"), { top: 1, layers: 2 }),
      rate: new Chart(element("rate-chart"), { top: 10 }),
      first: new Chart(element("first-chart"), { top: 100 }),
    };
    this.askedAt = performance.now();
    setInterval(() => document.hidden || this.ask(), INTERVAL_MS);
    document.addEventListener("visibilitychange", () => document.hidden || this.ask());
    this.ask();
  }

  // Counts a token that has just arrived.
  addToken() {
    this.tokens += 1;
  }

  showAnswer({ rate, firstMs }) {
    if (rate) element("rate").textContent = rate.toFixed(1);
    if (firstMs === undefined) return;
    this.firstMs = firstMs;
    element("first").textContent = duration(firstMs);
  }

  async ask() {
    const now = performance.now();
    this.charts.rate.add((this.tokens / Math.max(1, now - this.askedAt)) * 1000);
    this.charts.first.add(this.firstMs);
    [this.tokens, this.askedAt] = [0, now];
    let status = {};
    let state = "not reachable";
    try {
      status = await (await call("status", { key: this.key(), signal: AbortSignal.timeout(5000) })).json();
      state = STATES.get(status.up) ?? "load unknown";
    } catch (error) {
      if (error.status === 401) state = "needs an API key";
    }
    this.show(state, status);
    this.onStatus(status);
  }

  show(state, { running_requests: running, queued_requests: queued, ...kv }) {
    const shown = element("engine-state");
    if (shown.textContent !== state) shown.textContent = state; // only changes are read aloud
    shown.classList.toggle("ready", state === "ready");
    element("running").textContent = running ?? "–";
    element("queued").textContent = queued ?? "–";
    this.charts.running.add(running ?? 0);
    this.charts.queued.add(queued ?? 0);
    const { kv_tokens_used: used, kv_tokens_cached: cached, kv_tokens_total: total } = kv;
    element("kv").textContent = total ? percent(used / total) : "–";
    element("kv-tokens").textContent = total
      ? `${count(used)} of ${count(total)} · ${count(cached)} cached`
      : "";
    this.charts.kv.add(total ? used / total : 0, total ? cached / total : 0);
  }
}

export function duration(milliseconds) {
  return milliseconds < 1000 ? `${Math.round(milliseconds)} ms` : `${(milliseconds / 1000).toFixed(1)} s`;
}

export function count(number) {
  return number.toLocaleString("en");
}

function percent(share) {
  return `${(100 * share).toFixed(share < 0.1 ? 1 : 0)} %`;
}

function element(id) {
  return document.getElementById(id);
}
