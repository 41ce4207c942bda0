// Conversations as the agent keeps them; in this page's memory where it keeps none.

import { chosenOf } from "./badge.js";

const ROOT = "/v1/isthmus/conversations";
const MAX_TITLE_CHARS = 60;

// Every way that was looked at is kept of this many last messages; of older ones, the way taken.
const MAX_FULL_DECISIONS = 40;
const NEVER_SHOWN = new Set(["basis", "score_parts", "most_usd", "memory_bytes"]);

/**
 * A conversation: {id, title, messages}. A message: {role, content, stopped?, isthmus?} and, never saved,
 * `error` on an answer that failed.
 */
export class Conversations {
  #saving = Promise.resolve();
  #memory = []; // those that the agent does not keep

  /** `onSaveError(error)`: a save failed; null: saves work again. */
  constructor(api, onSaveError) {
    Object.assign(this, { api, onSaveError });
    this.enabled = true;
  }

  /** The conversations {id, title}, newest first. */
  async list() {
    let kept = [];
    try {
      const answer = await this.api.json(ROOT);
      [this.enabled, kept] = [answer.enabled, answer.data];
    } catch (error) {
      this.#goOnWithout(error);
    }
    return [...this.#memory.map(({ id, title }) => ({ id, title })), ...kept];
  }

  /** A new conversation; one that lives in this page where the agent cannot keep it. */
  async create(firstMessage) {
    const title = titleOf(firstMessage);
    if (this.enabled) {
      try {
        return { ...(await this.api.json(ROOT, { method: "POST", body: { title } })), messages: [] };
      } catch (error) {
        this.#goOnWithout(error);
      }
    }
    const conversation = { id: `page-${Date.now()}`, title, messages: [] };
    this.#memory.unshift(conversation);
    return conversation;
  }

  /** The conversation with its messages; an ApiError with status 404 where there is none. */
  async open(id) {
    return this.#ofPage(id) ?? this.api.json(pathOf(id));
  }

  async rename(id, title) {
    const mine = this.#ofPage(id);
    if (mine) mine.title = title;
    else await this.api.json(pathOf(id), { method: "PATCH", body: { title } });
  }

  async remove(id) {
    await this.#saving; // else a save on its way would miss it
    if (!this.#ofPage(id)) await this.api.json(pathOf(id), { method: "DELETE" });
    this.#memory = this.#memory.filter((conversation) => conversation.id !== id);
  }

  async removeAll() {
    await this.#saving;
    if (this.enabled) await this.api.json(ROOT, { method: "DELETE" });
    this.#memory = [];
  }

  /** Save the messages as they are now, after what is being saved already. */
  save(conversation) {
    if (this.#ofPage(conversation.id)) return Promise.resolve();
    const messages = conversation.messages
      .filter((one) => one.content || !(one.error || one.stopped))
      .map((one, index, all) => kept(one, index >= all.length - MAX_FULL_DECISIONS));
    this.#saving = this.#saving.then(() => this.#put(conversation.id, messages));
    return this.#saving;
  }

  /** An agent that cannot keep conversations can still answer; one that is not there cannot. */
  #goOnWithout(error) {
    if (error.status === 401 || error.code === "unreachable") throw error;
    this.onSaveError(error);
  }

  #ofPage(id) {
    return this.#memory.find((conversation) => conversation.id === id);
  }

  async #put(id, messages) {
    try {
      await this.api.json(`${pathOf(id)}/messages`, { method: "PUT", body: { messages } });
      this.onSaveError(null);
    } catch (error) {
      this.onSaveError(error);
    }
  }
}

function pathOf(id) {
  return `${ROOT}/${encodeURIComponent(id)}`;
}

function kept({ role, content, stopped, isthmus }, full) {
  const told = { ...(stopped ? { stopped } : {}), ...(isthmus ? { isthmus: slim(isthmus) } : {}) };
  const decision = told.isthmus?.decision;
  if (decision && !full) decision.candidates = [chosenOf(decision)].filter(Boolean);
  return { role, content, ...told };
}

/** What the page shows of it, with four digits, without what is 0 or not known. */
function slim(value) {
  if (typeof value === "number") return Number.isInteger(value) ? value : Number(value.toPrecision(4));
  if (Array.isArray(value)) return value.map(slim);
  if (value === null || typeof value !== "object") return value;
  const entries = Object.entries(value).filter(
    ([name, inner]) => inner !== null && inner !== 0 && !NEVER_SHOWN.has(name),
  );
  return Object.fromEntries(entries.map(([name, inner]) => [name, slim(inner)]));
}

function titleOf(text) {
  const line = text.trim().split("\n")[0].trim();
  return line.length <= MAX_TITLE_CHARS ? line : `${line.slice(0, MAX_TITLE_CHARS - 1).trimEnd()}…`;
}
