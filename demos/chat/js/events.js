// What happened to a request on its way, in sentences. Pure.

import { seconds, sentence } from "./format.js";

/**
 * The `events` of an answer as one sentence or more: {text, settled}. `settled`: the answer goes on (else the
 * agent still looks for a way). null where nothing happened.
 */
export function narrate(events) {
  const said = [];
  let lost = null; // the loss that nothing has settled yet
  for (const event of events ?? []) {
    if (event.event === "link_lost") lost ??= event;
    const told = clauseOf(event);
    if (!told) continue;
    said.push(lost ? `The cloud was lost at token ${lost.at_index}; ${told}` : sentence(told));
    lost = null;
  }
  if (lost) said.push(`The cloud was lost at token ${lost.at_index}; looking for a way to go on …`);
  return said.length ? { text: said.join(" "), settled: !lost } : null;
}

function clauseOf(event) {
  const after = event.after_s === undefined ? "" : ` after ${seconds(event.after_s)}`;
  if (event.event === "resumed") return `the session was taken up again${after}, nothing lost.`;
  if (event.event !== "moved") return null;
  if (event.reason === "asked")
    return `the answer was moved to ${placeOf(event)} at token ${event.at_index}.`;
  if (event.reason === "drain")
    return `the cloud is shutting down; the answer went on at ${event.cloud}${after}.`;
  if (event.route === "local") return `this device went on${after}, nothing lost.`;
  return `${event.cloud ?? "another cloud"} went on${after}, nothing lost.`;
}

function placeOf(event) {
  return event.route === "split"
    ? `a split at ${event.split}`
    : event.route === "local"
      ? "this device"
      : "the cloud";
}
