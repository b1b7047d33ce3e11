(() => {
  const { phases, moments } = JSON.parse(document.getElementById("moments").textContent);
  const plot = document.getElementById("plot");
  const cursor = document.getElementById("cursor");
  const slider = document.getElementById("moment");
  const [title, where] = document.getElementById("when").children;
  const rows = [...document.querySelectorAll(".legend-table tbody tr")];
  const bands = rows.filter((row) => !row.className);
  const total = rows.find((row) => row.className === "sum");
  const reserved = rows.find((row) => row.className === "held");
  const peak = Number(plot.dataset.peak);
  const written = rows.map((row) => [...row.cells].map((cell) => cell.innerHTML));
  const units = [[1 / 1048576, "B"], [1 / 1024, "KiB"], [1, "MiB"], [1024, "GiB"]];

  // Three significant digits, whole digits never dropped: as the rest of the page writes bytes.
  const text = (mib) => {
    if (!mib) return "–";
    const [size, name] = units.findLast(([unit]) => mib >= 0.9995 * unit) ?? units[0];
    const number = mib / size;
    const digits = Math.max(0, 2 - Math.floor(Math.log10(number)));
    return `${number.toLocaleString("en", { minimumFractionDigits: digits, maximumFractionDigits: digits })} ${name}`;
  };

  const show = (index) => {
    const [left, phase, event, held, ...parts] = moments[index];
    const sum = parts.reduce((a, b) => a + b, 0);
    cursor.style.left = `${100 * left}%`;
    title.textContent = index === peak ? "At the peak" : `Event ${event.toLocaleString("en")}`;
    where.textContent = `in ${phases[phase]}`;
    bands.forEach((row, i) => {
      row.cells[1].textContent = text(parts[i]);
      row.cells[2].textContent = parts[i] ? `${Math.round((100 * parts[i]) / sum)}%` : "";
    });
    total.cells[1].textContent = text(sum);
    if (reserved) reserved.cells[1].textContent = text(held);
    // The peak's figures as the page was written with them: rounding has two ways where a digit is a 5.
    if (index === peak) rows.forEach((row, i) => [1, 2].forEach((cell) => { row.cells[cell].innerHTML = written[i][cell]; }));
    slider.setAttribute("aria-valuetext", `${title.textContent} ${where.textContent}: ${text(sum)} allocated`);
  };

  // The moment whose step covers this place; within a few pixels of the peak, the peak.
  const at = (x, width) => {
    if (Math.abs(moments[peak][0] * width - x) < 4) return peak;
    let low = 0, high = moments.length - 1;
    while (low < high) {
      const middle = (low + high + 1) >> 1;
      if (moments[middle][0] * width <= x) low = middle; else high = middle - 1;
    }
    return low;
  };
  slider.addEventListener("input", () => show(at(slider.value / slider.max * plot.clientWidth, plot.clientWidth)));
  const pick = (index) => {
    slider.value = Math.round(moments[index][0] * slider.max);
    show(index);
  };
  const point = (event) => {
    const box = plot.getBoundingClientRect();
    pick(at(event.clientX - box.left, box.width));
  };
  plot.addEventListener("pointermove", point);
  plot.addEventListener("pointerdown", point);
  plot.addEventListener("pointerleave", () => pick(peak));
  addEventListener("beforeprint", () => pick(peak));
  pick(peak);
})();
