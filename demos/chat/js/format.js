// Numbers as people read them. Everything takes null for "not known".

const NONE = "–";

/** Is this a number? */
export function known(value) {
  return typeof value === "number" && Number.isFinite(value);
}

function digits(value, significant = 3) {
  if (value === 0) return "0";
  const places = Math.max(0, significant - 1 - Math.floor(Math.log10(Math.abs(value))));
  return value.toFixed(Math.min(places, 6));
}

export function seconds(value) {
  if (!known(value)) return NONE;
  if (value < 0.0995) return `${digits(value * 1000, 2)} ms`;
  return value < 100 ? `${digits(value, value < 10 ? 2 : 3)} s` : `${Math.round(value)} s`;
}

export function tokensPerSecond(value) {
  return known(value) ? `${digits(value, 3)} tok/s` : NONE;
}

export function bytes(value) {
  if (!known(value)) return NONE;
  const units = ["B", "kB", "MB", "GB", "TB"];
  let at = 0;
  while (value >= 999.5 && at < units.length - 1) [value, at] = [value / 1000, at + 1];
  return `${at === 0 ? Math.round(value) : digits(value, 3)} ${units[at]}`;
}

export function perSecond(value) {
  return known(value) ? `${bytes(value)}/s` : NONE;
}

export function joules(value) {
  return known(value) ? `${digits(value, 2)} J` : NONE;
}

export function dollars(value) {
  if (!known(value)) return NONE;
  if (value === 0) return "$0";
  return Math.abs(value) < 1e-4 ? `$${value.toExponential(1)}` : `$${digits(value, 2)}`;
}

/** With a capital letter, as a sentence begins. */
export function sentence(text) {
  return text.charAt(0).toUpperCase() + text.slice(1);
}

/** "layers 0–7", "layer 3". */
export function layerRange(first, last) {
  return first === last ? `layer ${first}` : `layers ${first}–${last}`;
}
