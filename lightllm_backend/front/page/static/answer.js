// SPDX-License-Identifier: Apache-2.0
// Asks the front for one answer and puts it into an exchange while it comes.

import { call, events, ServerError } from "./server.js";

// Fills answer, reasoning, tokens, firstMs, rate and finish of `exchange`; onToken() follows each change.
// Throws a ServerError; what had come until then stays.
export async function receive(exchange, { key, body, signal, onToken }) {
  const path = exchange.mode === "chat" ? "v1/chat/completions" : "v1/completions";
  const asked = performance.now();
  let first, last;
  body = { ...body, stream: true, stream_options: { include_usage: true } };
  for await (const { choices, usage } of events(await call(path, { key, body, signal }))) {
    const choice = choices?.[0];
    const text = choice?.delta?.content ?? choice?.text ?? "";
    const reasoning = choice?.delta?.reasoning_content ?? "";
    exchange.finish = choice?.finish_reason ?? exchange.finish;
    if (text || reasoning) {
      last = performance.now();
      first ??= last;
      exchange.firstMs = first - asked;
      exchange.answer += text;
      exchange.reasoning += reasoning;
      exchange.tokens += 1; // an event holds one token or more; `usage`, at the end, knows
    }
    exchange.tokens = usage?.completion_tokens ?? exchange.tokens;
    if (last > first && exchange.tokens > 1) exchange.rate = ((exchange.tokens - 1) / (last - first)) * 1000;
    onToken(Boolean(text || reasoning));
  }
  if (!exchange.finish) throw new ServerError("The server ended the answer early.");
}
