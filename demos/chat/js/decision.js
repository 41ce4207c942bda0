// The table behind a badge: every way that was looked at, what was predicted of it, and why not.

import { chosenOf, reasonOf, wayTaken } from "./badge.js";
import { el, figure } from "./dom.js";
import { bytes, dollars, joules, known, seconds, tokensPerSecond } from "./format.js";
import { narrate } from "./events.js";
import { wayName } from "./places.js";

// The parts of a way's time, by who takes it; names as in the API.
const SIDES = {
  edge: ["load_s", "prefill_edge_s", "decode_edge_s"],
  link: ["handshake_s", "prefill_link_s", "decode_link_s"],
  cloud: ["queue_s", "prefill_cloud_s", "decode_cloud_s"],
};
const TERM_WORDS = {
  load_s: "loading layers",
  handshake_s: "connecting",
  queue_s: "waiting at the cloud",
  prefill_edge_s: "prompt, this device",
  prefill_link_s: "prompt, link",
  prefill_cloud_s: "prompt, cloud",
  decode_edge_s: "tokens, this device",
  decode_link_s: "tokens, link",
  decode_cloud_s: "tokens, cloud",
};
const COLUMNS = [
  "Way",
  "First token",
  "Total",
  "Speed",
  "Energy",
  "Money",
  "Sent",
  "Where the time goes",
  "Note",
];

/** Fill and open `dialog` for an answer's `isthmus` object. */
export function openDecision(dialog, isthmus, numLayers) {
  const close = el(
    "button",
    { type: "button", class: "icon", "aria-label": "Close", dataset: { testid: "close-decision" } },
    "✕",
  );
  close.addEventListener("click", () => dialog.close());
  const decision = isthmus.decision;
  const events = narrate(isthmus.events);
  dialog.replaceChildren(
    el("header", {}, el("h2", { id: "decision-title" }, "Why this way"), close),
    el("p", { class: "why" }, reasonOf(isthmus) || "The agent told no reason."),
    ...(events ? [el("p", { class: "note", dataset: { tone: "info" } }, events.text)] : []),
    summary(isthmus, numLayers),
    ...(decision?.candidates?.length ? [legend(), table(decision, numLayers)] : [told(decision)]),
  );
  dialog.showModal();
}

function told(decision) {
  const text = decision
    ? "No other way was listed."
    : "The answer was stopped before the agent told what it had weighed.";
  return el("p", { class: "hint" }, text);
}

function summary(isthmus, numLayers) {
  const { decision, timings, link, counts } = isthmus;
  const predicted = chosenOf(decision);
  const against = (value) => (known(value) ? ` (predicted ${seconds(value)})` : "");
  const rows = [figure("Way", wayTaken(isthmus, numLayers))];
  if (timings) {
    rows.push(figure("First token", seconds(timings.ttft_s) + against(predicted?.ttft_s)));
    rows.push(figure("Total", seconds(timings.total_s ?? 0) + against(predicted?.total_s)));
  }
  if (counts) rows.push(figure("Tokens", `${counts.prompt_tokens} in, ${counts.completion_tokens ?? 0} out`));
  if (link) rows.push(figure("Link", `↑ ${bytes(link.bytes_up ?? 0)}, ↓ ${bytes(link.bytes_down ?? 0)}`));
  if (decision?.margin) rows.push(figure("Ahead of the next route by", dollars(decision.margin)));
  if (decision?.expected_tokens)
    rows.push(figure("Expected length", `${Math.round(decision.expected_tokens)} tokens`));
  if (isthmus.request_id) rows.push(figure("Request", isthmus.request_id, "whole"));
  return el("dl", { class: "figures across" }, rows);
}

function legend() {
  const key = (side, text) => el("span", { class: "key", dataset: { side } }, text);
  return el(
    "p",
    { class: "keys-of-terms" },
    key("edge", "this device"),
    key("link", "link"),
    key("cloud", "cloud"),
  );
}

function table(decision, numLayers) {
  const longest = Math.max(0, ...decision.candidates.map((one) => (one.feasible ? (one.total_s ?? 0) : 0)));
  const chosen = chosenOf(decision);
  const best = merged(ranked(decision.candidates, chosen));
  const head = el(
    "tr",
    {},
    COLUMNS.map((name, at) => el("th", { scope: "col", class: at > 0 && at < 7 ? "number" : "" }, name)),
  );
  const rows = best.map((one, at) => row(one, at === 0 && chosen !== undefined, longest, numLayers));
  return el(
    "div",
    { class: "scroll", tabIndex: 0, role: "region", "aria-label": "Every way" },
    el("table", {}, el("thead", {}, head), el("tbody", {}, rows)),
  );
}

/** The way taken, then what was possible by its score, then what was not. */
function ranked(candidates, chosen) {
  const order = (one) => (one === chosen ? 0 : one.feasible ? 1 : 2);
  return [...candidates].sort(
    (a, b) => order(a) - order(b) || (a.score ?? 0) - (b.score ?? 0) || (a.split ?? 0) - (b.split ?? 0),
  );
}

/** Splits in a row with nothing predicted and the same against them, as one; `last` is its last K. */
function merged(candidates) {
  const all = [];
  for (const one of candidates) {
    const before = all.at(-1);
    const alike =
      before && one.route === "split" && before.route === "split" && !one.feasible && !before.feasible;
    if (alike && !known(one.total_s) && !known(before.total_s) && one.detail === before.detail)
      before.last = one.split;
    else all.push({ ...one });
  }
  return all;
}

function nameOf(one, numLayers) {
  if (one.last !== undefined) return `split ${one.split}–${one.last} of ${numLayers}`;
  return wayName({ ...one, split: one.split ?? 0 }, numLayers);
}

function row(one, chosen, longest, numLayers) {
  const note = chosen ? "taken" : one.feasible ? "" : one.detail || one.violated;
  // A saved decision keeps neither what is 0 nor what is not known.
  const predicted = known(one.total_s);
  const cells = [
    seconds(one.ttft_s),
    seconds(one.total_s),
    tokensPerSecond(one.tokens_per_s),
    joules(one.energy_j),
    dollars(predicted ? (one.cost_usd ?? 0) : null),
    bytes(predicted ? (one.bytes_up ?? 0) + (one.bytes_down ?? 0) : null),
  ];
  return el(
    "tr",
    { dataset: { feasible: String(Boolean(one.feasible)), chosen: String(chosen) } },
    el("th", { scope: "row" }, nameOf(one, numLayers)),
    cells.map((text) => el("td", { class: "number" }, text)),
    el("td", {}, bar(one, longest)),
    el("td", { class: "detail" }, note),
  );
}

function bar(one, longest) {
  const terms = one.terms ?? {};
  const told = Object.entries(terms).filter(([, value]) => value > 0);
  const words = told.map(([name, value]) => `${TERM_WORDS[name] ?? name} ${seconds(value)}`).join(", ");
  const box = el("span", {
    class: "terms",
    role: "img",
    "aria-label": words || "not predicted",
    title: words,
  });
  for (const [side, names] of Object.entries(SIDES)) {
    const part = names.reduce((sum, name) => sum + (terms[name] ?? 0), 0);
    if (!part || !longest) continue;
    const piece = el("i", { dataset: { side } });
    piece.style.width = `${Math.min(100, (100 * part) / longest)}%`;
    box.append(piece);
  }
  return box;
}
