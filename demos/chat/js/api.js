// The agent's HTTP API: keys, errors in one shape, server-sent events.

const KEY = "isthmus.key";

/** What the agent answered instead of what was asked; `message` holds its hint already. */
export class ApiError extends Error {
  constructor(message, { code = "", status = 0, retryAfterS = null } = {}) {
    super(message);
    this.name = "ApiError";
    Object.assign(this, { code, status, retryAfterS });
  }
}

export class Api {
  #askKey;
  #asking = null;

  /** `askKey(again)`: a promise of the key that the user gives, null if none. `again`: one was refused. */
  constructor(askKey) {
    this.#askKey = askKey;
  }

  /**
   * A response that is OK. Otherwise an ApiError; what the network does is one, too, with the code
   * "unreachable". A 401 asks for a key once, unless `ask` is false.
   */
  async fetch(path, { method = "GET", body = undefined, signal = undefined, ask = true } = {}) {
    for (;;) {
      const used = storedKey();
      const headers = body === undefined ? {} : { "content-type": "application/json" };
      if (used) headers.authorization = `Bearer ${used}`;
      let response;
      try {
        response = await fetch(path, {
          method,
          headers,
          signal,
          cache: "no-store",
          body: body === undefined ? undefined : JSON.stringify(body),
        });
      } catch (error) {
        if (signal?.aborted) throw error;
        throw new ApiError("The agent does not answer. Is “isthmus serve edge” still running?", {
          code: "unreachable",
        });
      }
      if (response.ok) return response;
      const refusal = await errorOf(response);
      if (response.status !== 401 || !ask) throw refusal;
      if (storedKey() === used && !(await this.#newKey(used !== ""))) throw refusal;
    }
  }

  async json(path, options) {
    const response = await this.fetch(path, options);
    return response.status === 204 ? null : response.json();
  }

  /** The `data:` objects of an event stream, to its end or `[DONE]`. An `error` among them is thrown. */
  async *events(path, options) {
    const response = await this.fetch(path, options);
    const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
    let rest = "";
    try {
      for (;;) {
        const { value, done } = await reader.read();
        if (done) return;
        const parts = (rest + value).split(/\r?\n\r?\n/);
        rest = parts.pop();
        for (const part of parts) {
          const data = dataOf(part);
          if (data === "[DONE]") return;
          if (data === "") continue;
          const said = JSON.parse(data);
          if (said.error) throw new ApiError(said.error.message, { code: said.error.code ?? "" });
          yield said;
        }
      }
    } catch (error) {
      if (error instanceof ApiError || options?.signal?.aborted) throw error;
      throw new ApiError("The agent went away in the middle of the answer.", { code: "unreachable" });
    } finally {
      reader.cancel().catch(() => {});
    }
  }

  async #newKey(again) {
    this.#asking ??= this.#askKey(again).finally(() => (this.#asking = null));
    const key = await this.#asking;
    if (key) sessionStorage.setItem(KEY, key);
    return key;
  }
}

function storedKey() {
  return sessionStorage.getItem(KEY) ?? "";
}

function dataOf(event) {
  const lines = event.split(/\r?\n/).filter((line) => line.startsWith("data:"));
  return lines.map((line) => line.slice(5).trimStart()).join("\n");
}

async function errorOf(response) {
  const retryAfterS = Number(response.headers.get("retry-after")) || null;
  const told = await response.json().catch(() => null);
  const message = told?.error?.message ?? `The agent answered ${response.status} ${response.statusText}.`;
  return new ApiError(message, { code: told?.error?.code ?? "", status: response.status, retryAfterS });
}
