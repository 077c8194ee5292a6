// Click a column's title to sort by it: numbers from high to low first; rows without a number stay last.
for (const table of document.querySelectorAll("table.sortable")) {
  const body = table.tBodies[0];
  table.querySelectorAll("thead th").forEach((head, column) => {
    head.querySelector("button")?.addEventListener("click", () => {
      const key = (row) => row.cells[column].dataset.value ?? "";
      const rows = [...body.rows];
      const numeric = rows.some((row) => key(row) !== "" && !Number.isNaN(Number(key(row))));
      const first = numeric ? "descending" : "ascending";
      const order = head.getAttribute("aria-sort") === first ? (numeric ? "ascending" : "descending") : first;
      const sign = order === "ascending" ? 1 : -1;
      rows.sort((one, other) => {
        const [a, b] = [key(one), key(other)];
        if (a === "" || b === "") return (a === "") - (b === "");
        return sign * (numeric ? Number(a) - Number(b) : a.localeCompare(b));
      });
      for (const other of table.querySelectorAll("thead th")) other.removeAttribute("aria-sort");
      head.setAttribute("aria-sort", order);
      body.append(...rows);
    });
  });
}
