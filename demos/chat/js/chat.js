// One conversation at a time: ask, stream, stop, ask again, save.

import { narrate } from "./events.js";

export class Chat {
  #stop = null; // AbortController of the running answer
  #running = Promise.resolve();

  /**
   * `parts`: {api, conversations, log, map, banner, ask() (request fields of the controls), model()}.
   * `on`: {busy(isBusy), opened(conversation or null), listChanged()}.
   */
  constructor(parts, on) {
    Object.assign(this, parts);
    this.on = on;
    this.conversation = null;
  }

  get busy() {
    return this.#stop !== null;
  }

  /** Send the user's text and take in the answer. An ApiError where no conversation could be begun. */
  async send(text) {
    if (this.busy) return;
    if (!this.conversation) {
      this.conversation = await this.conversations.create(text);
      this.on.opened(this.conversation);
      this.on.listChanged();
    }
    const message = { role: "user", content: text };
    this.conversation.messages.push(message);
    this.log.dropNote();
    this.log.addUser(message);
    this.conversations.save(this.conversation);
    await this.#answer();
  }

  /** The last answer once more. */
  async retry() {
    if (this.busy || !this.conversation) return;
    this.log.dropNote();
    if (this.conversation.messages.at(-1)?.role === "assistant") {
      this.conversation.messages.pop();
      this.log.dropLast();
    }
    await this.#answer();
  }

  stop() {
    this.#stop?.abort();
  }

  /** Show another conversation, or an empty one (null); a running answer is stopped. */
  async show(conversation) {
    this.stop();
    await this.#running;
    this.banner.clear("answer");
    this.conversation = conversation;
    this.log.show(conversation?.messages ?? []);
    this.on.opened(conversation);
  }

  async #answer() {
    const { conversation } = this;
    const request = {
      model: this.model(),
      messages: conversation.messages
        .filter((one) => one.content)
        .map(({ role, content }) => ({ role, content })),
      stream: true,
      ...this.ask(),
    };
    const message = { role: "assistant", content: "" };
    conversation.messages.push(message);
    this.banner.clear("answer");
    this.#stop = new AbortController();
    this.on.busy(true);
    const view = this.log.addAnswer(message);
    this.#running = this.#stream(request, message, view, this.#stop.signal);
    await this.#running;
    this.#stop = null;
    this.map.run(null);
    view.finish();
    this.on.busy(false);
    await this.conversations.save(conversation);
    this.on.listChanged();
  }

  /** Take the stream into `message`. What goes wrong becomes its `error`, a stop its `stopped`. */
  async #stream(request, message, view, signal) {
    const clock = new Clock();
    try {
      for await (const chunk of this.api.events("/v1/chat/completions", {
        method: "POST",
        body: request,
        signal,
      })) {
        if (chunk.isthmus) this.#told(message, chunk.isthmus);
        const choice = chunk.choices?.[0];
        if (choice?.delta?.content) {
          clock.token();
          message.content += choice.delta.content;
          this.map.pulse();
          view.grow(clock.seen());
        }
        if (choice?.finish_reason && message.isthmus) message.isthmus.finish_reason = choice.finish_reason;
      }
    } catch (error) {
      if (signal.aborted) message.stopped = true;
      else message.error = Object.assign(error, { partial: message.content !== "" });
    }
    if (message.isthmus && !message.isthmus.timings) message.isthmus.seen = clock.seen();
  }

  /** An `isthmus` object of the stream: the first tells the way, later ones events, the last everything. */
  #told(message, said) {
    const before = message.isthmus ?? {};
    message.isthmus = said.timings
      ? said
      : { ...before, ...said, events: [...(before.events ?? []), ...(said.events ?? [])] };
    for (const event of said.timings ? [] : (said.events ?? [])) {
      if (event.event !== "moved") continue;
      Object.assign(message.isthmus, { route: event.route, split: event.split });
      if (event.shape !== undefined) message.isthmus.shape = event.shape;
    }
    const { route, split, shape } = message.isthmus;
    if (route) this.map.run({ route, split, shape });
    const happened = narrate(message.isthmus.events);
    if (happened) this.banner.show("answer", happened.text, happened.settled ? "good" : "bad");
  }
}

/** First token and speed as seen from here, for answers that end before the agent tells its figures. */
class Clock {
  #began = performance.now();
  #first = null;
  #last = null;
  #tokens = 0;

  token() {
    this.#last = performance.now();
    this.#first ??= this.#last;
    this.#tokens += 1;
  }

  /** {tokens, ttftS, tokensPerS}, as far as there is something to tell from. */
  seen() {
    if (this.#first === null) return {};
    const decode = (this.#last - this.#first) / 1000;
    const tokensPerS = decode > 0 ? (this.#tokens - 1) / decode : null;
    return { tokens: this.#tokens, ttftS: (this.#first - this.#began) / 1000, tokensPerS };
  }
}
