// What the agent says of this device, as figures.

import { figure } from "./dom.js";
import { bytes } from "./format.js";

export function showDevice(list, snapshot) {
  const model = snapshot.model ?? {};
  const loaded = snapshot.loaded_layers?.length ?? 0;
  list.replaceChildren(
    figure("Model", `${model.id ?? "–"}, ${model.bits ?? "–"} bits`),
    figure("Provider", snapshot.provider),
    figure("Layers loaded", `${loaded} of ${model.num_layers ?? "–"}`),
    figure("Weights", bytes(snapshot.weights_bytes)),
    figure("KV cache", bytes((snapshot.kv_bytes ?? 0) + (snapshot.kept_cache_bytes ?? 0))),
    figure("Process", bytes(snapshot.rss_bytes)),
    figure(
      "Running",
      `${snapshot.running} of ${snapshot.parallel}` + (snapshot.waiting ? `, ${snapshot.waiting} wait` : ""),
    ),
    figure("Answers", String(snapshot.finished)),
    ...(snapshot.routes ? [figure("Routes", routes(snapshot.routes))] : []),
  );
}

function routes(counts) {
  const some = Object.entries(counts).filter(([, count]) => count > 0);
  return some.length ? some.map(([route, count]) => `${route} ${count}`).join(", ") : "none taken yet";
}
