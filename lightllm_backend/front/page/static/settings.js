// SPDX-License-Identifier: Apache-2.0
// The sampling controls: a form that is kept over a reload, as the parameters of a request.

import { load, save } from "./store.js";

const NO_CHANGE = { presence_penalty: 0, frequency_penalty: 0, repetition_penalty: 1 };

export class Settings {
  constructor(form) {
    this.form = form;
    for (const [name, value] of Object.entries(load("settings", {}))) {
      if (form.elements[name]) form.elements[name].value = value;
    }
    this.sliders = [...form.querySelectorAll("[data-sets]")];
    for (const slider of this.sliders) {
      slider.addEventListener("input", () => (form.elements[slider.dataset.sets].value = slider.value));
    }
    form.addEventListener("input", () => this.changed());
    form.addEventListener("reset", () => setTimeout(() => this.changed()));
    form.addEventListener("submit", (event) => event.preventDefault());
    this.changed();
  }

  changed() {
    for (const slider of this.sliders) slider.value = this.form.elements[slider.dataset.sets].value;
    save("settings", Object.fromEntries(new FormData(this.form)));
  }

  get system() {
    return this.form.elements.system.value.trim();
  }

  // The fields that are filled in, under the API's names. Whether a value is allowed is for the server to say.
  parameters() {
    const fields = Object.fromEntries(new FormData(this.form));
    const parameters = {};
    for (const [name, value] of Object.entries(fields)) {
      if (name === "system" || name === "stop" || value === "") continue;
      if (Number(value) !== NO_CHANGE[name]) parameters[name] = Number(value);
    }
    const stop = fields.stop.split(/\r?\n/).filter(Boolean).map(unescape);
    if (stop.length) parameters.stop = stop;
    return parameters;
  }
}

function unescape(text) {
  return text.replace(/\\([nt\\])/g, (_, letter) => ({ n: "\n", t: "\t", "\\": "\\" })[letter]);
}
