// SPDX-License-Identifier: Apache-2.0
// Finds the highest simulated load that keeps the limit, and what a million tokens costs at it.
"use strict";

const field = (id) => document.getElementById(id);

const distinct = (values) => [...new Set(values)];

// The row with the most output tokens a second among those whose first token p99 keeps the limit, in seconds, and in
// which about as many requests end as come.
function best(rows, limit) {
  const kept = rows.filter(
    (row) =>
      row.first_token_p99 !== null &&
      row.first_token_p99 <= limit &&
      row.requests_per_second >= SUSTAINED * row.arrivals_per_second,
  );
  return kept.reduce((a, b) => (a && a.output_tokens_per_second >= b.output_tokens_per_second ? a : b), null);
}

// Dollars for a million tokens, at so many dollars a GPU and hour.
function cost(gpus, tokensPerSecond, price) {
  return (1e6 * price * gpus) / 3600 / tokensPerSecond;
}

function offer(select, values) {
  const before = select.value;
  select.replaceChildren(...values.map((value) => new Option(value, value)));
  if (values.map(String).includes(before)) select.value = before;
}

function table(lines) {
  const element = document.createElement("table");
  for (const [name, value] of lines) {
    const row = element.insertRow();
    const heading = document.createElement("th");
    heading.scope = "row";
    heading.textContent = name;
    row.append(heading);
    row.insertCell().textContent = value;
  }
  return element;
}

function show() {
  const { model, gpu, gpus, rows } = CAPACITY.find((one) => one.model === field("model").value);
  offer(field("replicas"), distinct(rows.map((row) => row.replicas)));
  const ofCount = rows.filter((row) => row.replicas === Number(field("replicas").value));
  offer(field("policy"), distinct(ofCount.map((row) => row.policy)));
  const candidates = ofCount.filter((row) => row.policy === field("policy").value);
  const output = document.querySelector("output");
  const price = field("price");
  if (!price.checkValidity()) {
    output.textContent = `The price is ${price.value || "empty"}; allowed: a number of at least 0.`;
    return;
  }
  const row = best(candidates, Number(field("limit").value));
  if (!row) {
    const rates = candidates.map((one) => one.rate).join(", ");
    output.textContent = `No simulated load is sustained and keeps this limit (requests a second and replica: ${rates}).`;
    return;
  }
  const all = row.output_tokens_per_second + row.prompt_tokens_per_second;
  const dollars = (tokens) => `$${cost(gpus * row.replicas, tokens, Number(price.value)).toFixed(3)}`;
  output.replaceChildren(
    table([
      ["A million output tokens", dollars(row.output_tokens_per_second)],
      ["A million tokens of prompts and answers", dollars(all)],
      ["GPUs", `${gpus * row.replicas} × ${gpu}`],
      ["Requests a second", row.requests_per_second.toFixed(1)],
      ["Output tokens a second", Math.round(row.output_tokens_per_second).toLocaleString("en")],
      ["First token p99", `${Math.round(1e3 * row.first_token_p99)} ms`],
      ["Prompt tokens found in the cache", `${Math.round(100 * row.cached_share)} %`],
    ]),
  );
  document.title = `What a million tokens of ${model} costs`;
}

offer(field("model"), CAPACITY.map((one) => one.model));
document.querySelector("form").addEventListener("input", show);
document.querySelector("form").addEventListener("submit", (event) => event.preventDefault());
show();
