// Before the first paint, so that nothing flashes: the theme that was chosen here, else the system's.
"use strict";
(() => {
  try {
    const chosen = localStorage.getItem("pdserve-theme");
    if (chosen === "light" || chosen === "dark") document.documentElement.dataset.theme = chosen;
  } catch {
    // storage is switched off: the system's theme it is
  }
})();
