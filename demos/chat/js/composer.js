// The message field: grows with the text, Enter sends, Escape stops.

const MAX_HEIGHT_PX = 220;

export class Composer {
  /** `parts`: {form, field, send, stop} elements; `on`: {send(text), stop(), busy()}. */
  constructor(parts, on) {
    Object.assign(this, parts);
    this.on = on;
    this.form.addEventListener("submit", (event) => {
      event.preventDefault();
      this.#submit();
    });
    this.field.addEventListener("keydown", (event) => {
      if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
      event.preventDefault();
      this.#submit();
    });
    this.field.addEventListener("input", () => this.#fit());
    this.stop.addEventListener("click", () => on.stop());
    document.addEventListener("keydown", (event) => {
      if (event.key === "Escape" && on.busy() && !document.querySelector("dialog[open]")) on.stop();
    });
    this.#fit();
  }

  setBusy(busy) {
    const onButton = document.activeElement === this.send || document.activeElement === this.stop;
    this.send.hidden = busy;
    this.stop.hidden = !busy;
    if (onButton) (busy ? this.stop : this.field).focus();
  }

  /** Give the text back that could not be sent. */
  restore(text) {
    if (!this.field.value) this.field.value = text;
    this.#fit();
  }

  #submit() {
    const text = this.field.value.trim();
    if (!text || this.on.busy()) return;
    this.field.value = "";
    this.#fit();
    this.on.send(text);
  }

  #fit() {
    this.field.style.height = "auto";
    this.field.style.height = `${Math.min(MAX_HEIGHT_PX, this.field.scrollHeight)}px`;
    this.send.disabled = !this.field.value.trim();
  }
}
