// What a conversation shows before its first message: the three routes, and something to ask.

import { el } from "./dom.js";

const ROUTES = [
  [
    "local",
    "100%",
    "Local",
    "Every layer runs on this device. No network, no cloud cost.",
    "Explain what an isthmus is, in two sentences.",
  ],
  [
    "split",
    "45%",
    "Split",
    "The first layers run here, the rest in the cloud. One round trip per token.",
    "Write a short letter from one shore to the other.",
  ],
  [
    "offload",
    "0%",
    "Offload",
    "The cloud runs it all and sends the text back. One round trip per answer.",
    "List five famous bridges, each with its city.",
  ],
];

/** Fill `root`; `onAsk(text)`: the user takes one of the prompts. */
export function fillEmptyState(root, onAsk) {
  root.replaceChildren(
    el("h2", {}, "One model, two shores."),
    el("p", { class: "lead" }, "Each answer takes one of three ways, and its badge says which and why."),
    el(
      "ul",
      { class: "routes" },
      ROUTES.map((route) => line(route, onAsk)),
    ),
  );
}

function line([name, share, title, text, prompt], onAsk) {
  const bar = el("i", { class: "share", "aria-hidden": "true" });
  bar.style.setProperty("--edge-share", share);
  const ask = el("button", { type: "button", class: "sample", dataset: { testid: "sample" } }, prompt);
  ask.addEventListener("click", () => onAsk(prompt));
  return el("li", { dataset: { route: name } }, bar, el("p", {}, el("strong", {}, title), " ", text), ask);
}
