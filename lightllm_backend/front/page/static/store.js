// SPDX-License-Identifier: Apache-2.0
// What outlives a reload: in the tab's session storage, so that it is gone with the tab.

export function load(name, fallback) {
  try {
    return JSON.parse(sessionStorage.getItem(`lightllm.${name}`)) ?? fallback;
  } catch {
    return fallback;
  }
}

export function save(name, value) {
  try {
    sessionStorage.setItem(`lightllm.${name}`, JSON.stringify(value));
  } catch {
    // Full or forbidden: the page works on, and a reload forgets.
  }
}
