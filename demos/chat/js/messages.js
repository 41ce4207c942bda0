// The messages as they are seen, the growing answer among them.

import { badge } from "./badge.js";
import { el } from "./dom.js";
import { narrate } from "./events.js";
import { sentence, tokensPerSecond } from "./format.js";
import { copyText, MarkdownView } from "./markdown.js";
import { wayName } from "./places.js";

const NEAR_END_PX = 240;
const REDRAW_MS = 60;

export class MessageLog {
  /** `scroller` is what scrolls; `actions`: {retry(), openDecision(isthmus), numLayers()}. */
  constructor(root, scroller, actions) {
    Object.assign(this, { root, scroller, actions });
  }

  /** Show these messages instead of what is shown. */
  show(messages) {
    this.root.replaceChildren();
    for (const message of messages) {
      if (message.role === "user") this.addUser(message);
      else if (message.role === "assistant") this.addAnswer(message).finish();
    }
    if (messages.at(-1)?.role === "user") this.#unanswered();
    this.scroller.scrollTop = this.scroller.scrollHeight;
  }

  addUser({ content }) {
    this.#dropRetry();
    const words = el("div", { class: "text plain", dir: "auto", dataset: { testid: "text" } }, content);
    this.root.append(
      el(
        "article",
        { class: "message user", "aria-label": "You", dataset: { testid: "message", role: "user" } },
        words,
      ),
    );
    this.scroller.scrollTop = this.scroller.scrollHeight;
  }

  /** A view of `message`, which grows; finish() when it has ended. */
  addAnswer(message) {
    this.#dropRetry();
    const view = new AnswerView(message, this.actions, () => this.#follow());
    this.root.append(view.element);
    this.#follow();
    return view;
  }

  /** Take the last answer away, to be asked for again. */
  dropLast() {
    this.root.lastElementChild?.remove();
  }

  dropNote() {
    this.root.querySelector(".unanswered")?.remove();
  }

  #unanswered() {
    const again = el(
      "button",
      { type: "button", class: "quiet", dataset: { testid: "retry" } },
      "Answer now",
    );
    again.addEventListener("click", () => this.actions.retry());
    this.root.append(el("p", { class: "unanswered hint" }, "No answer was kept. ", again));
  }

  #dropRetry() {
    this.root.querySelector('[data-testid="retry"]')?.remove();
  }

  /** Stay at the end, unless the user has scrolled up to read. */
  #follow() {
    const { scroller } = this;
    if (scroller.scrollHeight - scroller.scrollTop - scroller.clientHeight < NEAR_END_PX)
      scroller.scrollTop = scroller.scrollHeight;
  }
}

class AnswerView {
  #drawn = 0;
  #timer = 0;
  #seen = {};

  constructor(message, actions, onGrown) {
    Object.assign(this, { message, actions, onGrown });
    this.text = el("div", { class: "text", dataset: { testid: "text" } });
    this.markdown = new MarkdownView(this.text);
    this.waiting = el(
      "p",
      { class: "waiting" },
      el("span", { class: "visually-hidden" }, "Waiting for the first token"),
      el("i"),
      el("i"),
      el("i"),
    );
    this.live = el("p", { class: "live hint", "aria-hidden": "true" });
    this.foot = el("footer", {}, this.live);
    this.element = el(
      "article",
      {
        class: "message assistant",
        "aria-label": "Answer",
        dataset: { testid: "message", role: "assistant" },
      },
      this.waiting,
      this.text,
      this.foot,
    );
  }

  /** The message has grown; drawn at most every REDRAW_MS. `seen`: its speed {tokens, tokensPerS} so far. */
  grow(seen) {
    this.waiting.remove();
    this.#seen = seen;
    if (this.#timer) return;
    const wait = Math.max(0, REDRAW_MS - (performance.now() - this.#drawn));
    this.#timer = setTimeout(() => this.#draw(), wait);
  }

  /** The message is as it stays: its badge, what went wrong, what can be done. */
  finish() {
    this.waiting.remove();
    this.#draw();
    const { message, actions } = this;
    const notes = [];
    const happened = narrate(message.isthmus?.events);
    if (happened) notes.push(el("p", { class: "note", dataset: { tone: "info" } }, happened.text));
    if (message.isthmus?.finish_reason === "length")
      notes.push(el("p", { class: "hint" }, "Cut here: the most tokens that were allowed."));
    if (message.stopped)
      notes.push(
        el("p", { class: "hint" }, message.content ? "Stopped." : "Stopped before the first token."),
      );
    if (message.error) notes.push(failure(message.error));
    const copy = el("button", { type: "button", class: "quiet" }, "Copy");
    copy.addEventListener("click", () => copyText(message.content, copy));
    const again = el("button", { type: "button", class: "quiet", dataset: { testid: "retry" } }, "Retry");
    again.addEventListener("click", () => actions.retry());
    const shown = message.isthmus
      ? badge(message.isthmus, actions.numLayers(), () => actions.openDecision(message.isthmus))
      : null;
    const tools = el("span", { class: "tools" }, message.content ? copy : null, again);
    this.foot.replaceChildren(...notes, ...[shown, tools].filter(Boolean));
    this.onGrown();
  }

  #draw() {
    clearTimeout(this.#timer);
    this.#timer = 0;
    this.#drawn = performance.now();
    this.markdown.update(this.message.content);
    const { isthmus } = this.message;
    const { tokens, tokensPerS } = this.#seen;
    if (isthmus?.route && tokens)
      this.live.textContent = [
        wayName(isthmus, this.actions.numLayers()),
        `${tokens} tokens`,
        tokensPerSecond(tokensPerS),
      ].join("  ·  ");
    this.onGrown();
  }
}

function failure(error) {
  const wait =
    error.retryAfterS && !error.message.includes("try again in")
      ? ` It asks to wait ${error.retryAfterS} s before the next try.`
      : "";
  return el(
    "div",
    { class: "failure", role: "alert", dataset: { testid: "error", code: error.code ?? "" } },
    el("strong", {}, error.partial ? "The answer broke off. " : "No answer. "),
    `${sentence(error.message)}${wait}`,
    error.code ? el("code", {}, error.code) : null,
  );
}
