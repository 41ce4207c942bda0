// The link over the last two minutes: round trip, and bytes per second up and down.

import { el, figure, svg } from "./dom.js";
import { bytes, perSecond, seconds } from "./format.js";

const SPAN_S = 120;
const WIDTH = 280;
const HEIGHT = 56;

const STATES = {
  up: "up",
  down: "down",
  refused: "refused",
  unknown: "not tried yet",
  connecting: "connecting",
};

/** The cloud to look at: one that stands, else the first. null: none is configured. */
export function cloudOf(snapshot) {
  const clouds = snapshot.clouds ?? [];
  return clouds.find((cloud) => cloud.state === "up") ?? clouds[0] ?? null;
}

export class LinkChart {
  #samples = []; // {at, rttS, up, down}; seconds, bytes per second
  #before = null; // {url, at, up, down} of the snapshot before

  constructor(root) {
    this.rtt = chart("Round trip", "rtt");
    this.flow = chart("Traffic", "flow");
    this.figures = el("dl", { class: "figures" });
    this.note = el("p", { class: "hint" });
    for (const box of [this.rtt.box, this.flow.box, this.figures]) box.hidden = true;
    root.append(this.note, this.rtt.box, this.flow.box, this.figures);
  }

  /** Take in a snapshot; `now`: seconds of a steady clock. */
  add(snapshot, now) {
    const cloud = cloudOf(snapshot);
    this.note.textContent = cloud ? cloud.detail : "No cloud is configured: everything runs on this device.";
    this.note.hidden = !this.note.textContent;
    for (const box of [this.rtt.box, this.flow.box, this.figures]) box.hidden = !cloud;
    if (!cloud) return;
    const before = this.#before?.url === cloud.url ? this.#before : null;
    const passed = before ? now - before.at : 0;
    const rate = (total, old) => (passed > 0 ? Math.max(0, total - old) / passed : 0);
    const up = before ? rate(cloud.bytes_up, before.up) : 0;
    const down = before ? rate(cloud.bytes_down, before.down) : 0;
    this.#before = { url: cloud.url, at: now, up: cloud.bytes_up, down: cloud.bytes_down };
    this.#samples.push({ at: now, rttS: cloud.state === "up" ? cloud.rtt_s : null, up, down });
    this.#samples = this.#samples.filter((sample) => now - sample.at <= SPAN_S);
    this.#draw(cloud, now);
  }

  #draw(cloud, now) {
    const x = (sample) => WIDTH * (1 - (now - sample.at) / SPAN_S);
    const rtts = this.#samples.filter((sample) => sample.rttS !== null);
    const slowest = Math.max(0.001, ...rtts.map((sample) => sample.rttS)) * 1.15;
    this.rtt.line(rtts.map((sample) => [x(sample), HEIGHT * (1 - sample.rttS / slowest)]));
    this.rtt.say(seconds(this.#samples.at(-1).rttS));

    const most = Math.max(1, ...this.#samples.flatMap((sample) => [sample.up, sample.down]));
    const half = HEIGHT / 2;
    this.flow.areas(
      this.#samples.map((sample) => [x(sample), half * (1 - sample.up / most)]),
      this.#samples.map((sample) => [x(sample), half * (1 + sample.down / most)]),
    );
    const last = this.#samples.at(-1);
    this.flow.say(`↑ ${perSecond(last.up)}  ↓ ${perSecond(last.down)}`);

    this.figures.replaceChildren(
      figure("Cloud", cloud.url.replace(/^wss?:\/\//, "")),
      figure("State", (STATES[cloud.state] ?? cloud.state) + (cloud.circuit === "open" ? ", paused" : "")),
      ...(cloud.device
        ? [figure("Runs on", [cloud.device, cloud.precision].filter(Boolean).join(", "))]
        : []),
      figure("Bandwidth up", perSecond(cloud.up_bytes_per_s)),
      figure("Bandwidth down", perSecond(cloud.down_bytes_per_s)),
      figure("Sent", bytes(cloud.bytes_up)),
      figure("Received", bytes(cloud.bytes_down)),
    );
  }
}

function chart(name, kind) {
  const now = el("output", {});
  const plot = svg("svg", { viewBox: `0 0 ${WIDTH} ${HEIGHT}`, preserveAspectRatio: "none", role: "img" });
  const parts = ["up", "down", "line"].map((part) =>
    svg("path", { class: part, "vector-effect": "non-scaling-stroke" }),
  );
  const [upper, lower, stroke] = parts;
  const base = kind === "flow" ? HEIGHT / 2 : HEIGHT - 0.5;
  plot.append(
    svg("path", { class: "base", d: `M0 ${base}H${WIDTH}`, "vector-effect": "non-scaling-stroke" }),
    ...parts,
  );
  const box = el("figure", { class: `chart ${kind}` }, el("figcaption", {}, el("span", {}, name), now), plot);
  const through = (points) => points.map(([x, y]) => `${x.toFixed(1)} ${y.toFixed(1)}`).join("L");
  const area = (points) =>
    points.length < 2 ? "" : `M${points[0][0]} ${base}L${through(points)}L${points.at(-1)[0]} ${base}Z`;
  return {
    box,
    say(text) {
      now.textContent = text;
      plot.setAttribute("aria-label", `${name} over the last two minutes, now ${text}`);
    },
    line(points) {
      stroke.setAttribute("d", points.length < 2 ? "" : `M${through(points)}`);
    },
    areas(up, down) {
      upper.setAttribute("d", area(up));
      lower.setAttribute("d", area(down));
    },
  };
}
