// Runs before the first paint, so that a chosen theme does not flash the other one.
(function () {
  try {
    const theme = localStorage.getItem("isthmus.theme");
    if (theme === "light" || theme === "dark") document.documentElement.dataset.theme = theme;
  } catch {
    // Storage is forbidden here: the system's theme holds.
  }
})();
