// One region for what the user should know now: an answer's events, a cloud that is down, a lost agent.

import { el } from "./dom.js";

/** Notes by topic; a note replaces the one of its topic. */
export class Banner {
  #notes = new Map();
  #dismissed = new Map(); // topic to the text that the user closed

  constructor(root) {
    this.root = root;
  }

  /** Show `text` under `topic`; `tone`: "bad", "good" or "info". */
  show(topic, text, tone = "info") {
    if (this.#dismissed.get(topic) === text || this.#notes.get(topic)?.text === text) return;
    this.#notes.set(topic, { text, tone });
    this.#draw();
  }

  clear(topic) {
    this.#dismissed.delete(topic);
    if (this.#notes.delete(topic)) this.#draw();
  }

  #draw() {
    this.root.hidden = this.#notes.size === 0;
    this.root.replaceChildren(...[...this.#notes].map(([topic, note]) => this.#line(topic, note)));
  }

  #line(topic, { text, tone }) {
    const close = el("button", { type: "button", class: "quiet", "aria-label": "Dismiss" }, "✕");
    close.addEventListener("click", () => {
      this.#dismissed.set(topic, text);
      this.#notes.delete(topic);
      this.#draw();
    });
    return el("p", { class: "note", dataset: { tone } }, el("span", {}, text), close);
  }
}

/** A sentence about the clouds where none of them stands and one is known to be lost, else null. */
export function cloudTrouble(snapshot) {
  const clouds = snapshot.clouds ?? [];
  const down = clouds.filter((cloud) => cloud.state === "down" || cloud.state === "refused");
  if (!down.length || clouds.some((cloud) => cloud.state === "up")) return null;
  const [{ url, state }] = down;
  const what = state === "refused" ? "refuses this device" : "is not reachable";
  return `The cloud ${url} ${what}. Until it is back, only this device can answer.`;
}
