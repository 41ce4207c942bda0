// The model as a strip of cells: two lands, edge and cloud, and the bridge between them. Each streamed token
// sends a light over the way that the request takes.

import { el } from "./dom.js";
import { layerRange, seconds } from "./format.js";
import { inWords, placeOf, unitsOf, wayName } from "./places.js";

const MAX_LIGHTS = 3;
const TAIL_UNITS = 2.5;
const LIGHT_MS = 520;
const FRAME_MS = 30; // the processor has layers to compute, too
const WIRE_UNITS = 5; // how long a light takes over the wire, in cells
const PREVIEW_MS = 2500;
const SHORE_CELLS = 6; // over so many cells the land narrows towards a bridge
const NARROWEST = 0.42;

const calm = matchMedia("(prefers-reduced-motion: reduce)");

export class LayerMap {
  #numLayers = 0;
  #cells = new Map(); // unit to element
  #path = []; // what a light passes: {element, start, length} in units
  #lit = new Set();
  #lights = [];
  #frame = 0;
  #drawnAt = 0;
  #loaded = new Set();
  #way = null; // of the running request
  #previewed = null;
  #previewTimer = 0;
  #rttS = null;

  /** `strip` holds the cells; `legend` {edge, wire, cloud}: where the words go. */
  constructor(strip, legend) {
    this.strip = strip;
    this.legend = legend;
    this.wires = [0, 1].map(() => el("span", { class: "wire", hidden: true }, el("i")));
  }

  /** The model has this many layers. */
  setModel(numLayers) {
    if (numLayers === this.#numLayers) return;
    this.#numLayers = numLayers;
    this.#cells = new Map(unitsOf(numLayers).map((unit) => [unit, cellOf(unit)]));
    this.strip.replaceChildren(...this.#cells.values());
    this.#show();
  }

  /** Layers that are loaded here while nothing runs, and the link's round trip. */
  rest(loadedLayers, rttS) {
    const same = this.#rttS === rttS && loadedLayers.length === this.#loaded.size;
    if (same && loadedLayers.every((layer) => this.#loaded.has(layer))) return;
    [this.#loaded, this.#rttS] = [new Set(loadedLayers), rttS];
    this.#show();
  }

  /** A request runs this `way` {route, split, shape}; null: none runs. */
  run(way) {
    const before = this.#way;
    if (before === way || (before && way && wayKey(before) === wayKey(way))) return;
    this.#way = way;
    if (way) this.#previewed = null;
    else this.#endLights();
    this.#show();
  }

  /** Show for a moment which units would run where. */
  preview(way) {
    if (this.#way) return;
    this.#previewed = way;
    clearTimeout(this.#previewTimer);
    this.#previewTimer = setTimeout(() => {
      this.#previewed = null;
      this.#show();
    }, PREVIEW_MS);
    this.#show();
  }

  /** One token came out of the running request. */
  pulse() {
    if (!this.#way) return;
    if (calm.matches) {
      this.#light(new Set(this.#path.map((part) => part.element)));
      return;
    }
    const now = performance.now();
    this.#lights = this.#lights.filter((began) => now - began < LIGHT_MS);
    const last = this.#lights.at(-1);
    if (this.#lights.length >= MAX_LIGHTS || (last !== undefined && now - last < LIGHT_MS / MAX_LIGHTS))
      return;
    this.#lights.push(now);
    this.#frame ||= requestAnimationFrame((at) => this.#draw(at));
  }

  // ---- places ---------------------------------------------------------------------------------------

  #show() {
    if (!this.#numLayers) return;
    const way = this.#way ?? this.#previewed;
    const places = unitsOf(this.#numLayers).map((unit) => [
      unit,
      way ? placeOf(unit, way) : this.#atRest(unit),
    ]);
    places.forEach(([unit, place], index) => {
      const cell = this.#cells.get(unit);
      cell.dataset.place = place;
      cell.style.setProperty("--rise", String(way ? width(places, index) : 1));
    });
    this.#bridge(way ? places : []);
    this.strip.dataset.state = this.#way ? "running" : this.#previewed ? "preview" : "rest";
    this.#words(way);
  }

  #atRest(unit) {
    // The agent tells of layers only; embedding and head go with their neighbours.
    const layer = unit === "embed" ? 0 : unit === "head" ? this.#numLayers - 1 : unit;
    return this.#loaded.has(layer) ? "edge" : "idle";
  }

  /** Put the wires where the place changes, and lay the path of the lights. */
  #bridge(places) {
    const wires = [...this.wires];
    this.#path = [];
    let start = 0;
    const pass = (element, length) => {
      this.#path.push({ element, start, length });
      start += length;
    };
    places.forEach(([unit, place], index) => {
      const cell = this.#cells.get(unit);
      if (index > 0 && place !== places[index - 1][1]) {
        const wire = wires.shift();
        cell.before(wire);
        wire.hidden = false;
        pass(wire, WIRE_UNITS);
      }
      pass(cell, 1);
    });
    for (const wire of wires) wire.hidden = true;
  }

  #words(way) {
    const { edge, wire, cloud } = this.legend;
    const loaded = this.#loaded.size;
    if (way) {
      const said = inWords(way, this.#numLayers, layerRange);
      edge.textContent = `This device: ${said.edge}`;
      cloud.textContent = `Cloud: ${said.cloud}`;
      wire.textContent = way.route === "local" || this.#rttS === null ? "" : `${seconds(this.#rttS)} apart`;
      this.strip.setAttribute(
        "aria-label",
        `${wayName(way, this.#numLayers)}. This device: ${said.edge}. Cloud: ${said.cloud}.`,
      );
      return;
    }
    edge.textContent = `This device: ${loaded} of ${this.#numLayers} layers loaded`;
    [wire.textContent, cloud.textContent] = ["", ""];
    this.strip.setAttribute("aria-label", `At rest. ${edge.textContent}.`);
  }

  // ---- lights ---------------------------------------------------------------------------------------

  #draw(now) {
    this.#frame = this.#lights.length ? requestAnimationFrame((at) => this.#draw(at)) : 0;
    if (now - this.#drawnAt < FRAME_MS) return;
    this.#drawnAt = now;
    const end = this.#path.reduce((sum, part) => sum + part.length, 0) + TAIL_UNITS;
    const lit = new Set();
    this.#lights = this.#lights.filter((began) => now - began < LIGHT_MS);
    for (const began of this.#lights) {
      const head = (Math.max(0, now - began) / LIGHT_MS) * end;
      for (const { element, start, length } of this.#path) {
        if (start > head || start + length < head - TAIL_UNITS) continue;
        lit.add(element);
        element.style.setProperty("--at", String(Math.min(1, (head - start) / length)));
      }
    }
    this.#light(lit);
  }

  #light(lit) {
    for (const element of this.#lit) if (!lit.has(element)) element.dataset.lit = "false";
    for (const element of lit) element.dataset.lit = "true";
    this.#lit = lit;
  }

  #endLights() {
    if (calm.matches) this.#light(new Set());
  }
}

function cellOf(unit) {
  const name = unit === "embed" ? "Embedding" : unit === "head" ? "Head" : `Layer ${unit}`;
  const kind = typeof unit === "number" ? "cell" : "cell end";
  return el("span", {
    class: kind,
    title: name,
    dataset: { layer: String(unit), place: "idle", lit: "false" },
  });
}

/** How wide the land is at this cell, 0 … 1: it narrows towards a bridge. */
function width(places, index) {
  const place = places[index][1];
  let cells = 0;
  while (
    cells < SHORE_CELLS &&
    samePlace(places, index - cells - 1, place) &&
    samePlace(places, index + cells + 1, place)
  )
    cells += 1;
  return NARROWEST + (1 - NARROWEST) * (cells / SHORE_CELLS) ** 0.7;
}

/** Beyond both ends of the model there is more land. */
function samePlace(places, index, place) {
  return index < 0 || index >= places.length || places[index][1] === place;
}

function wayKey(way) {
  return `${way.route} ${way.split} ${way.shape}`;
}
