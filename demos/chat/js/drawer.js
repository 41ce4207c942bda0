// A side panel that is a drawer while the window is too narrow for it.

/**
 * `query`: the media query under which `panel` is a drawer; `opener`: its button; `rest`: what cannot be
 * reached while the drawer is open.
 */
export function bindDrawer(panel, opener, rest, query) {
  const narrow = matchMedia(query);
  const isOpen = () => panel.dataset.open === "true";

  function set(open) {
    panel.dataset.open = String(open);
    opener.setAttribute("aria-expanded", String(open));
    panel.inert = narrow.matches && !open;
    for (const other of rest) other.inert = narrow.matches && open;
    document.body.dataset.drawer = String(narrow.matches && open);
  }

  function close() {
    if (!isOpen()) return;
    set(false);
    if (narrow.matches) opener.focus();
  }

  opener.addEventListener("click", () => {
    set(!isOpen());
    if (isOpen()) panel.querySelector("button, select, input")?.focus();
  });
  // Before others see it: this Escape closes the drawer, it stops no answer.
  const onEscape = (event) => {
    const elsewhere = document.querySelector("dialog[open]") || event.target.closest?.(".rename");
    if (event.key !== "Escape" || !narrow.matches || !isOpen() || elsewhere) return;
    event.stopPropagation();
    close();
  };
  document.addEventListener("keydown", onEscape, { capture: true });
  document.addEventListener("pointerdown", (event) => {
    if (narrow.matches && isOpen() && !panel.contains(event.target) && !opener.contains(event.target))
      close();
  });
  narrow.addEventListener("change", () => set(false));
  set(false);
  return { close };
}
