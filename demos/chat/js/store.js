// What this browser remembers: the controls and the theme. A browser that forbids storage forgets them.

const CONTROLS = "isthmus.controls";
const THEME = "isthmus.theme";

/** How requests are asked for. null: the agent's own default, or the router's choice. */
export const DEFAULTS = Object.freeze({
  route: "auto",
  split: null,
  shape: null,
  privacy: "any",
  sloTtftS: null,
  sloTokensPerS: null,
  temperature: null,
  maxTokens: null,
});

export function loadControls() {
  try {
    const kept = JSON.parse(read(CONTROLS) ?? "{}");
    const ours = Object.keys(DEFAULTS).filter((name) => name in kept);
    return { ...DEFAULTS, ...Object.fromEntries(ours.map((name) => [name, kept[name]])) };
  } catch {
    return { ...DEFAULTS };
  }
}

export function saveControls(controls) {
  write(CONTROLS, JSON.stringify(controls));
}

/** "light", "dark", or null for what the system says. */
export function loadTheme() {
  return read(THEME);
}

export function saveTheme(theme) {
  write(THEME, theme);
}

function read(name) {
  try {
    return localStorage.getItem(name);
  } catch {
    return null;
  }
}

function write(name, value) {
  try {
    localStorage.setItem(name, value);
  } catch {
    // Private mode, or full: nothing is lost but the memory of it.
  }
}
