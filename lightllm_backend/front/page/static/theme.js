// SPDX-License-Identifier: Apache-2.0
// Light or dark: the system's choice, or the reader's. Not a module, because it runs before the first paint.

(() => {
  const root = document.documentElement;
  const system = matchMedia("(prefers-color-scheme: dark)");
  const systems = () => (system.matches ? "dark" : "light");
  const current = () => root.dataset.theme ?? systems();

  try {
    const chosen = localStorage.getItem("lightllm.theme");
    if (chosen) root.dataset.theme = chosen;
  } catch {
    // Without storage the page follows the system after a reload.
  }

  // What the system would choose is not kept, so that the page follows it again.
  function choose(theme) {
    delete root.dataset.theme;
    if (theme !== systems()) root.dataset.theme = theme;
    try {
      if (root.dataset.theme) localStorage.setItem("lightllm.theme", theme);
      else localStorage.removeItem("lightllm.theme");
    } catch {
      // As above.
    }
  }

  document.addEventListener("DOMContentLoaded", () => {
    const button = document.getElementById("theme");
    const tell = () => button.setAttribute("aria-pressed", current() === "dark");
    button.addEventListener("click", () => {
      choose(current() === "dark" ? "light" : "dark");
      tell();
    });
    system.addEventListener("change", tell);
    tell();
  });
})();
