// SPDX-License-Identifier: Apache-2.0
// Calls of the front: JSON, and the events of a streamed answer.

// Why a call failed, in words for the reader. status: of the HTTP answer; 0 if there was none.
export class ServerError extends Error {
  constructor(message, status = 0) {
    super(message);
    this.status = status;
  }
}

// The answer to a GET, or with `body` to a POST; paths are relative, so the page also works under a proxy's prefix.
export async function call(path, { key, body, signal } = {}) {
  const headers = { ...(key && { Authorization: `Bearer ${key}` }), ...(body && { "Content-Type": "application/json" }) };
  let response;
  try {
    response = await fetch(path, { method: body ? "POST" : "GET", headers, body: body && JSON.stringify(body), signal });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ServerError("The server cannot be reached.");
  }
  if (!response.ok) throw new ServerError(await refusal(response), response.status);
  return response;
}

async function refusal(response) {
  const text = await response.text().catch(() => "");
  try {
    const message = JSON.parse(text).error.message;
    if (typeof message === "string" && message) return message;
  } catch {
    // A proxy's page, for example.
  }
  return `The server answered with status ${response.status}${response.statusText && ` (${response.statusText})`}.`;
}

// The JSON of each server-sent event up to [DONE]. Lines end with \n or \r\n; comments and other fields are skipped.
export async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  let data = [];
  for (;;) {
    let chunk;
    try {
      chunk = await reader.read();
    } catch (error) {
      if (error.name === "AbortError") throw error;
      throw new ServerError("The connection to the server broke.");
    }
    if (chunk.done) throw new ServerError("The server ended the answer early.");
    const lines = (rest + chunk.value).split(/\r?\n/);
    rest = lines.pop();
    for (const line of lines) {
      if (line.startsWith("data:")) {
        data.push(line.slice(5).trimStart());
      } else if (line === "" && data.length) {
        const text = data.join("\n");
        data = [];
        if (text === "[DONE]") return;
        yield parse(text);
      }
    }
  }
}

function parse(text) {
  let event;
  try {
    event = JSON.parse(text);
  } catch {
    throw new ServerError("The server sent an event that is not JSON.");
  }
  if (event.error) throw new ServerError(event.error.message ?? "The server failed.");
  return event;
}
