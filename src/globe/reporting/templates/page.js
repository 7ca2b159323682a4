// A click on a heading sorts by that column, another one turns the order round; what is missing stays last.
for (const table of document.querySelectorAll("table")) {
  const heads = Array.from(table.tHead.rows[0].cells);
  heads.forEach((head, column) => {
    head.querySelector("button").addEventListener("click", () => {
      const order = head.getAttribute("aria-sort") === "ascending" ? -1 : 1;
      heads.forEach((other) => other.removeAttribute("aria-sort"));
      head.setAttribute("aria-sort", order === 1 ? "ascending" : "descending");
      const key = (row) => row.cells[column].dataset.sort;
      const rows = Array.from(table.tBodies[0].rows);
      const numbers = rows.every((row) => key(row) === undefined || !Number.isNaN(Number(key(row))));
      rows.sort((one, two) => {
        const a = key(one), b = key(two);
        if (a === undefined || b === undefined) return (a === undefined) - (b === undefined);
        return order * (numbers ? Number(a) - Number(b) : a.localeCompare(b, undefined, { numeric: true }));
      });
      table.tBodies[0].append(...rows);
    });
  });
}
