// The two small questions: the agent's API key, and "really?".

import { el } from "./dom.js";

/** Ask for the agent's key: a promise of it, null where none is given. `again`: the last one was refused. */
export function askKey(dialog, again) {
  const why = again
    ? "That key is none of this agent’s."
    : "It answers only those who have one of its keys (isthmus key makes them).";
  const field = el("input", {
    type: "password",
    id: "key",
    autocomplete: "off",
    required: true,
    "aria-describedby": "key-why",
    dataset: { testid: "key" },
  });
  const body = [
    el("p", { id: "key-why" }, why),
    el("label", { htmlFor: "key" }, "API key"),
    field,
    el("p", { class: "hint" }, "It is kept in this tab only, until the tab is closed."),
  ];
  return asked(dialog, "key-title", "This agent wants a key", body, "Use this key", () => field.value.trim());
}

/** true if the user confirms. `action`: the word on the button. */
export async function confirmed(dialog, title, text, action) {
  return Boolean(await asked(dialog, "confirm-title", title, [el("p", {}, text)], action, () => "yes"));
}

function asked(dialog, titleId, title, body, action, value) {
  const cancel = el("button", { type: "button", class: "quiet" }, "Cancel");
  const form = el(
    "form",
    { method: "dialog" },
    el("h2", { id: titleId }, title),
    body,
    el(
      "div",
      { class: "buttons" },
      cancel,
      el("button", { type: "submit", class: "primary", dataset: { testid: "confirm" } }, action),
    ),
  );
  let result = null;
  form.addEventListener("submit", () => (result = value() || null));
  cancel.addEventListener("click", () => dialog.close());
  dialog.replaceChildren(form);
  dialog.showModal();
  return new Promise((resolve) => dialog.addEventListener("close", () => resolve(result), { once: true }));
}
