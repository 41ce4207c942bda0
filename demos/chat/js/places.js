// Which unit of the model (embedding, layers 0 … N-1, head) runs where. Pure.

/** The units in the order in which a token passes them. */
export function unitsOf(numLayers) {
  return ["embed", ...Array.from({ length: numLayers }, (_, layer) => layer), "head"];
}

/** "edge" or "cloud" for a unit of a request that takes `way` {route, split, shape}. */
export function placeOf(unit, way) {
  if (way.route === "local") return "edge";
  if (way.route === "offload") return "cloud";
  if (unit === "embed") return "edge";
  if (unit === "head") return way.shape === "u" ? "edge" : "cloud";
  return unit < way.split ? "edge" : "cloud";
}

/** What each side runs, in words: {edge, cloud}. */
export function inWords(way, numLayers, range) {
  const all = `all ${numLayers} layers`;
  if (way.route === "local") return { edge: all, cloud: "nothing" };
  if (way.route === "offload") return { edge: "nothing", cloud: all };
  const here = way.split > 0 ? range(0, way.split - 1) : "embedding";
  const there = range(way.split, numLayers - 1);
  return way.shape === "u"
    ? { edge: `${here} and the head`, cloud: there }
    : { edge: here, cloud: `${there} and the head` };
}

/** A way in a few words: "local", "offload", "split at 8 of 30". */
export function wayName(way, numLayers) {
  if (way.route !== "split") return way.route;
  const of = numLayers ? ` of ${numLayers}` : "";
  return `split ${way.split}${of}${way.shape === "u" ? ", U-shaped" : ""}`;
}
