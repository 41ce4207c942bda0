// The agent's snapshots, one a second, while the page is seen; after a loss again, waiting longer each time.

const FIRST_WAIT_MS = 1000;
const MAX_WAIT_MS = 8000;

export class StatsFeed {
  #stop = null;

  /** `onSnapshot(snapshot)`; `onState(error)`: null once snapshots come, else why they don't. */
  constructor(api, onSnapshot, onState) {
    Object.assign(this, { api, onSnapshot, onState });
    document.addEventListener("visibilitychange", () => (document.hidden ? this.#pause() : this.start()));
  }

  start() {
    if (this.#stop || document.hidden) return;
    this.#stop = new AbortController();
    this.#follow(this.#stop.signal);
  }

  #pause() {
    this.#stop?.abort();
    this.#stop = null;
  }

  async #follow(signal) {
    let wait = FIRST_WAIT_MS;
    while (!signal.aborted) {
      let failure = null;
      try {
        for await (const snapshot of this.api.events("/v1/stats/stream", { signal, ask: false })) {
          if (signal.aborted) return;
          wait = FIRST_WAIT_MS;
          this.onState(null);
          this.onSnapshot(snapshot);
        }
      } catch (error) {
        failure = error;
      }
      if (signal.aborted) return;
      if (failure) this.onState(failure);
      await pause(wait, signal);
      wait = Math.min(MAX_WAIT_MS, wait * 2);
    }
  }
}

function pause(ms, signal) {
  return new Promise((resolve) => {
    const timer = setTimeout(resolve, ms);
    const wake = () => {
      clearTimeout(timer);
      resolve();
    };
    signal.addEventListener("abort", wake, { once: true });
  });
}
