// How answers are asked for: route, K, shape, privacy, expectations, sampling.

import { el } from "./dom.js";
import { DEFAULTS, loadControls, saveControls } from "./store.js";

const ROUTES = {
  auto: "auto: the router chooses",
  local: "local: all here",
  split: "split: here and there",
  offload: "offload: all in the cloud",
};
const SHAPES = {
  "": "as the agent likes",
  prefix: "prefix: the cloud has the head",
  u: "U: the head stays here",
};
const PRIVACY = {
  any: "any: text may leave",
  "activations-only": "activations only",
  "local-only": "local only",
};

// name: [label, test id, least, most, step, placeholder]
const NUMBERS = {
  sloTtftS: ["First token within, s", "slo-ttft", 0.01, null, "any", "no wish"],
  sloTokensPerS: ["At least, tok/s", "slo-tps", 0.01, null, "any", "no wish"],
  temperature: ["Temperature", "temperature", 0, 2, "any", "model’s own"],
  maxTokens: ["Most tokens", "max-tokens", 1, null, 1, "what fits"],
};

export class Controls {
  #numLayers = 0;

  /** `onChange(values, name)` after each change; `values` as DEFAULTS in store.js. */
  constructor(form, onChange) {
    this.values = loadControls();
    this.onChange = onChange;
    this.route = select("route", ROUTES);
    this.shape = select("shape", SHAPES);
    this.privacy = select("privacy", PRIVACY);
    this.split = el("input", {
      type: "range",
      id: "c-split",
      min: 0,
      max: 1,
      step: 1,
      disabled: true,
      dataset: { testid: "split", chosen: "false" },
      "aria-describedby": "c-split-now",
    });
    this.splitNow = el("output", { id: "c-split-now", htmlFor: "c-split" });
    this.splitAuto = el(
      "button",
      { type: "button", class: "quiet", hidden: true, dataset: { testid: "split-auto" } },
      "Let the router choose K",
    );
    this.numbers = Object.fromEntries(
      Object.entries(NUMBERS).map(([name, spec]) => [name, number(name, spec)]),
    );
    form.append(
      labelled("Route", this.route),
      el(
        "div",
        { class: "field split-field" },
        el("span", { class: "row" }, el("label", { htmlFor: "c-split" }, "Layers here (K)"), this.splitNow),
        this.split,
        this.splitAuto,
      ),
      labelled("Shape of a split", this.shape),
      labelled("Privacy", this.privacy),
      el(
        "div",
        { class: "pair" },
        labelled(NUMBERS.sloTtftS[0], this.numbers.sloTtftS),
        labelled(NUMBERS.sloTokensPerS[0], this.numbers.sloTokensPerS),
      ),
      el(
        "div",
        { class: "pair" },
        labelled(NUMBERS.temperature[0], this.numbers.temperature),
        labelled(NUMBERS.maxTokens[0], this.numbers.maxTokens),
      ),
      (this.reset = el(
        "button",
        { type: "button", class: "quiet", dataset: { testid: "reset-controls" } },
        "Back to the defaults",
      )),
    );
    form.addEventListener("submit", (event) => event.preventDefault());
    this.#listen();
    this.#show();
  }

  /** K runs from 0 to this. */
  setModel(numLayers) {
    this.#numLayers = numLayers;
    this.#show();
  }

  /** The part of a request's body that these controls make. */
  ask() {
    const { route, split, shape, privacy, sloTtftS, sloTokensPerS, temperature, maxTokens } = this.values;
    const slo = {
      ...(sloTtftS === null ? {} : { ttft_s: sloTtftS }),
      ...(sloTokensPerS === null ? {} : { tokens_per_s: sloTokensPerS }),
    };
    const splits = route === "auto" || route === "split";
    return {
      ...(temperature === null ? {} : { temperature }),
      ...(maxTokens === null ? {} : { max_tokens: maxTokens }),
      isthmus: {
        route,
        privacy,
        explain: true,
        ...(splits && split !== null ? { split } : {}),
        ...(shape === null ? {} : { shape }),
        ...(Object.keys(slo).length ? { slo } : {}),
      },
    };
  }

  #listen() {
    this.route.addEventListener("change", () => {
      this.#set("route", this.route.value);
      this.#show();
    });
    this.shape.addEventListener("change", () => this.#set("shape", this.shape.value || null));
    this.privacy.addEventListener("change", () => this.#set("privacy", this.privacy.value));
    this.split.addEventListener("input", () => {
      this.#set("split", Number(this.split.value));
      this.#show();
    });
    this.splitAuto.addEventListener("click", () => {
      this.#set("split", null);
      this.#show();
      this.split.focus();
    });
    for (const [name, field] of Object.entries(this.numbers)) {
      field.addEventListener("input", () => {
        field.setAttribute("aria-invalid", String(!field.validity.valid));
        if (field.validity.valid) this.#set(name, field.value === "" ? null : Number(field.value));
      });
    }
    this.reset.addEventListener("click", () => {
      this.values = { ...DEFAULTS };
      saveControls(this.values);
      this.#show();
      this.onChange(this.values, "reset");
    });
  }

  #set(name, value) {
    this.values = { ...this.values, [name]: value };
    saveControls(this.values);
    this.onChange(this.values, name);
  }

  /** Make the fields say what `values` say; a K that this route or model cannot have is drawn in. */
  #show() {
    const { values } = this;
    this.route.value = values.route;
    this.shape.value = values.shape ?? "";
    this.privacy.value = values.privacy;
    for (const [name, field] of Object.entries(this.numbers)) {
      if (field.value === "" || Number(field.value) !== values[name]) field.value = values[name] ?? "";
      field.removeAttribute("aria-invalid");
    }
    if (!this.#numLayers) return;
    const [least, most] = values.route === "split" ? [1, this.#numLayers - 1] : [0, this.#numLayers];
    [this.split.min, this.split.max] = [least, most];
    if (values.split !== null && (values.split < least || values.split > most)) {
      this.#set("split", Math.min(most, Math.max(least, values.split)));
    }
    const splits = values.route === "auto" || values.route === "split";
    const k = this.values.split;
    this.split.disabled = !splits;
    this.split.value = k ?? Math.round(this.#numLayers / 2);
    this.split.dataset.chosen = String(k !== null);
    this.splitAuto.hidden = !splits || k === null;
    this.splitNow.textContent = !splits
      ? "the route says"
      : k === null
        ? "the router chooses"
        : `${k} of ${this.#numLayers}`;
    this.shape.disabled = !splits;
  }
}

function select(name, options) {
  const choices = Object.entries(options).map(([value, text]) => el("option", { value }, text));
  return el("select", { id: `c-${name}`, dataset: { testid: name } }, choices);
}

function number(name, [, testid, min, max, step, placeholder]) {
  return el("input", {
    type: "number",
    id: `c-${name}`,
    min,
    max: max ?? "",
    step,
    placeholder,
    inputMode: "decimal",
    dataset: { testid },
  });
}

function labelled(text, field) {
  return el("div", { class: "field" }, el("label", { htmlFor: field.id }, text), field);
}
