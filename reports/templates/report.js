"use strict";
(() => {
  const root = document.documentElement;
  root.classList.add("scripted");

  // The theme follows the system until someone chooses; a file opened from the disk may have no storage.
  const store = {
    get() { try { return localStorage.getItem("vramcalc-theme"); } catch { return null; } },
    set(value) { try { localStorage.setItem("vramcalc-theme", value); } catch { /* not remembered */ } },
  };
  const system = matchMedia("(prefers-color-scheme: dark)");
  const toggle = document.getElementById("theme");
  const isDark = () => (root.dataset.theme ? root.dataset.theme === "dark" : system.matches);
  const show = () => toggle.setAttribute("aria-pressed", String(isDark()));
  const saved = store.get();
  if (saved === "dark" || saved === "light") root.dataset.theme = saved;
  toggle.addEventListener("click", () => {
    root.dataset.theme = isDark() ? "light" : "dark";
    store.set(root.dataset.theme);
    show();
  });
  system.addEventListener("change", show);
  show();

  const value = (cell) => (cell.hasAttribute("data-v") ? cell.dataset.v : cell.textContent);

  // Numbers sort as numbers, text as text; empty cells stay last either way.
  const compare = (a, b, numeric) => (numeric ? Number(a) - Number(b) : a.localeCompare(b, "en", { numeric: true }));
  for (const table of document.querySelectorAll("table")) {
    const heads = [...table.tHead.rows[0].cells];
    heads.forEach((head, column) => {
      const numeric = head.classList.contains("number");
      const button = document.createElement("button");
      button.type = "button";
      button.append(...head.childNodes);
      head.append(button);
      button.addEventListener("click", () => {
        const down = head.getAttribute("aria-sort") === "ascending";
        heads.forEach((other) => other.removeAttribute("aria-sort"));
        head.setAttribute("aria-sort", down ? "descending" : "ascending");
        const body = table.tBodies[0];
        const rows = [...body.rows].map((row) => [value(row.cells[column]), row]);
        rows.sort(([a], [b]) => (a === "" || b === "" ? (a === "") - (b === "") : (down ? -1 : 1) * compare(a, b, numeric)));
        body.append(...rows.map(([, row]) => row));
      });
    });
  }

  const plain = (text) => text.replace(/[\t\r\n]+/g, " ").trim();
  const toText = (table) => [
    [...table.tHead.rows[0].cells].map((cell) => cell.dataset.name),
    ...[...table.tBodies[0].rows].map((row) => [...row.cells].map((cell) => plain(value(cell)))),
  ].map((row) => row.join("\t")).join("\n") + "\n";

  // The clipboard may be closed to files from the disk: then the older way, through a selection.
  const copy = async (text) => {
    try {
      await navigator.clipboard.writeText(text);
      return true;
    } catch {
      const area = document.createElement("textarea");
      area.value = text;
      area.style.position = "fixed";
      area.style.opacity = "0";
      document.body.append(area);
      area.select();
      try { return document.execCommand("copy"); } finally { area.remove(); }
    }
  };
  const status = document.getElementById("status");
  for (const button of document.querySelectorAll("button[data-copy]")) {
    button.addEventListener("click", async () => {
      const table = document.getElementById(button.dataset.copy).querySelector("table");
      const done = await copy(toText(table));
      button.textContent = done ? "Copied" : "Not copied";
      status.textContent = done ? "The table is on the clipboard." : "The browser did not allow copying.";
      button.focus();
      setTimeout(() => { button.textContent = "Copy"; }, 1600);
    });
  }
})();
