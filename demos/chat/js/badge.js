// An answer's badge: which way it took, and what that was like.

import { el } from "./dom.js";
import { bytes, joules, seconds, sentence, tokensPerSecond } from "./format.js";
import { wayName } from "./places.js";

/** The candidate that a decision took, with its predicted figures; undefined where none is listed. */
export function chosenOf(decision) {
  return decision?.candidates?.find(
    (one) =>
      one.route === decision.route &&
      (one.split ?? 0) === (decision.split ?? 0) &&
      (one.shape ?? null) === (decision.shape ?? null),
  );
}

/**
 * The badge of an answer's `isthmus` object: a button, `onOpen` its click. What a stopped answer never learnt
 * of the agent is what this page measured, in `seen` {ttftS, tokensPerS}.
 */
export function badge(isthmus, numLayers, onOpen) {
  const seen = isthmus.seen ?? {};
  const ttft = isthmus.timings?.ttft_s ?? seen.ttftS;
  const speed = isthmus.timings?.decode_tokens_per_s || seen.tokensPerS;
  const energy = isthmus.energy_j ?? chosenOf(isthmus.decision)?.energy_j;
  const link = isthmus.link ?? {};
  const figures = [
    ["time to first token", ttft === undefined ? null : `${seconds(ttft)} to first token`],
    ["speed", speed ? tokensPerSecond(speed) : null],
    [
      "bytes over the link",
      link.bytes_up || link.bytes_down
        ? `↑ ${bytes(link.bytes_up ?? 0)} ↓ ${bytes(link.bytes_down ?? 0)}`
        : null,
    ],
    ["energy of this device, predicted", energy ? joules(energy) : null],
  ].filter(([, text]) => text);
  const way = wayOf(isthmus);
  const button = el(
    "button",
    {
      type: "button",
      class: "badge",
      dataset: { testid: "badge", route: way.route },
      "aria-haspopup": "dialog",
    },
    el("span", { class: "way" }, mark(way, numLayers), wayTaken(isthmus, numLayers)),
    figures.map(([what, text]) => el("span", { class: "figure", title: what }, text)),
    el("span", { class: "reason" }, reasonOf(isthmus)),
  );
  button.addEventListener("click", onOpen);
  return button;
}

/** Why, in a sentence; "" where the agent told nothing. */
export function reasonOf(isthmus) {
  return sentence(isthmus.decision?.reason ?? isthmus.reason ?? "");
}

/** The way in words, with the one at the start where the answer was moved: "offload → local". */
export function wayTaken(isthmus, numLayers) {
  const last = wayName(wayOf(isthmus), numLayers);
  const first = isthmus.decision ? wayName(wayOf(isthmus.decision), numLayers) : last;
  return first === last ? last : `${first} → ${last}`;
}

function wayOf({ route, split, shape }) {
  return { route, split: split ?? 0, shape };
}

/** A small bar: how much of the model ran on each side. */
function mark(way, numLayers) {
  const share =
    way.route === "local" ? 1 : way.route === "offload" ? 0 : way.split / (numLayers || way.split * 2 || 1);
  const bar = el("i", { class: "share", "aria-hidden": "true" });
  bar.style.setProperty("--edge-share", `${Math.round(share * 100)}%`);
  return bar;
}
