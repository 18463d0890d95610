/* Tables whose heads sort them: up, down, and up again.

   Runs as js_on_load of a gr.HTML, where `element` is its outermost element. A cell is sorted by its data-value where
   it has one, or by its text; what has none comes last. */

const valueOf = (row, column) => {
  const cell = row.cells[column];
  const text = cell.dataset.value ?? cell.textContent.trim();
  const number = Number(text);
  return text === '' || Number.isNaN(number) ? text : number;
};

const compared = (a, b) => {
  if (a === '' || b === '') return (a === '') - (b === ''); // turned round by neither direction
  return typeof a === 'number' && typeof b === 'number' ? a - b : String(a).localeCompare(String(b));
};

element.addEventListener('click', (event) => {
  const head = event.target.closest('.tf-sort')?.closest('th');
  if (!head) return;
  const down = head.getAttribute('aria-sort') === 'ascending';
  const body = head.closest('table').tBodies[0];
  for (const other of head.parentElement.cells) other.setAttribute('aria-sort', 'none');
  head.setAttribute('aria-sort', down ? 'descending' : 'ascending');
  const keyed = [...body.rows].map((row) => [valueOf(row, head.cellIndex), row]);
  keyed.sort(([a], [b]) => (down && a !== '' && b !== '' ? compared(b, a) : compared(a, b)));
  body.append(...keyed.map(([, row]) => row));
});
