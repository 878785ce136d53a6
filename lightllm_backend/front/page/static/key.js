// SPDX-License-Identifier: Apache-2.0
// The API key: asked for when the server refuses a call without one, kept for this tab.

import { load, save } from "./store.js";

const dialog = document.getElementById("key-dialog");
const field = document.getElementById("key");
const note = document.getElementById("key-note");
const change = document.getElementById("change-key");
const FIRST_NOTE = note.textContent;

let key = load("key", "");
change.hidden = !key;
change.addEventListener("click", () => ask(FIRST_NOTE));
document.getElementById("key-cancel").addEventListener("click", () => dialog.close("cancel"));

export function apiKey() {
  return key;
}

// The result of work(), which is tried again with each key that the reader gives after a 401.
export async function withKey(work) {
  for (;;) {
    const tried = key;
    try {
      return await work();
    } catch (error) {
      if (error.status !== 401) throw error;
      if (key === tried && !(await ask(tried ? error.message : FIRST_NOTE))) throw error;
    }
  }
}

// Whether the reader has given a key.
async function ask(text) {
  note.textContent = text;
  field.value = key;
  dialog.returnValue = "";
  if (!dialog.open) dialog.showModal();
  await new Promise((resolve) => dialog.addEventListener("close", resolve, { once: true }));
  if (dialog.returnValue !== "save") return false;
  key = field.value.trim();
  save("key", key);
  change.hidden = !key;
  return true;
}
