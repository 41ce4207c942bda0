// Light or dark: the system's, until the user says otherwise.

import { loadTheme, saveTheme } from "./store.js";

export function bindTheme(button) {
  const system = matchMedia("(prefers-color-scheme: dark)");
  const current = () => loadTheme() ?? (system.matches ? "dark" : "light");
  const label = () => button.setAttribute("aria-label", `Theme: ${current()}. Switch to ${other(current())}`);
  button.addEventListener("click", () => {
    const theme = other(current());
    saveTheme(theme);
    document.documentElement.dataset.theme = theme;
    label();
  });
  system.addEventListener("change", label);
  label();
}

function other(theme) {
  return theme === "dark" ? "light" : "dark";
}
