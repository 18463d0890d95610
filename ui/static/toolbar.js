/* The small buttons of the results: copy a link or a program; and on every tab, explain a number.

   Runs as js_on_load of the gr.HTML above the results, where `element` is its outermost element. What is copied or
   said is read from the page and set as text alone. */

const results = element.closest('#tf-results');
const app = element.closest('.gradio-container');
const note = element.querySelector('#tf-note');
const said = element.querySelector('#tf-said');

const copy = async (text) => {
  if (navigator.clipboard) {
    try {
      await navigator.clipboard.writeText(text);
      return true;
    } catch (error) {
      if (error.name !== 'NotAllowedError') throw error;
    }
  }
  // Pages that came over plain HTTP have no clipboard.
  const field = Object.assign(document.createElement('textarea'), { value: text });
  document.body.append(field);
  field.select();
  const done = document.execCommand('copy');
  field.remove();
  return done;
};

const copied = async (button) => {
  const { copy: query, copyFrom, copyText, copyTab } = button.dataset;
  const page = location.origin + location.pathname;
  const text = copyText ? `${copyText} ${page}#${copyTab}`
    : copyFrom ? document.getElementById(copyFrom).textContent : new URL(query, location.href).href;
  const done = await copy(text);
  button.focus(); // which the field took away
  said.textContent = done ? said.dataset.copied : said.dataset.failed;
  button.dataset.label ??= button.textContent;
  button.textContent = said.textContent;
  setTimeout(() => { button.textContent = button.dataset.label; }, 1600);
};

const explain = (what) => {
  note.textContent = what.getAttribute('title') ?? what.querySelector('title').textContent; // or of a drawing
  note.showPopover();
  const [box, mine] = [what.getBoundingClientRect(), note.getBoundingClientRect()];
  const below = box.bottom + 8 + mine.height < innerHeight;
  note.style.left = `${Math.max(8, Math.min(innerWidth - mine.width - 8, box.left))}px`;
  note.style.top = `${below ? box.bottom + 6 : Math.max(8, box.top - mine.height - 6)}px`;
};

/* Chips of columns, which Gradio draws: a format, or a format@recipe, with +options. */
const { formats, recipes, options } = Object.fromEntries(
  Object.entries(note.dataset).map(([kind, text]) => [kind, JSON.parse(text)]));
const chipOf = (target) => {
  const chip = target.closest?.(':is(#tf-precisions, #tf-further, #tf-plan-precision, #tf-blind-precision) label');
  const input = chip?.querySelector('input');
  if (!input) return null;
  const [column, ...more] = (formats[input.value.split(/[@+]/)[0]] ? input.value : input.name).split('+');
  const [format, recipe] = column.split('@');
  if (!formats[format]) return null;
  chip.title = [formats[format], recipes[recipe], ...more.map((name) => options[`+${name}`])].filter(Boolean).join(' ');
  return chip;
};
app.addEventListener('pointerover', (event) => chipOf(event.target));
app.addEventListener('focusin', ({ target }) => {
  const what = chipOf(target) ?? target.closest('[data-why]');
  if (what && target.matches(':focus-visible')) explain(what);
});
app.addEventListener('focusout', () => { if (note.matches(':popover-open')) note.hidePopover(); });

app.addEventListener('click', (event) => {
  const button = event.target.closest('.tf-copy:is([data-copy], [data-copy-from], [data-copy-text])');
  if (button) copied(button);
});
app.append(note, said); // out of the tab, which hides them together with the rest
app.addEventListener('click', (event) => {
  const what = event.target.closest('[data-why]');
  if (what) explain(what);
});
addEventListener('scroll', () => { if (note.matches(':popover-open')) note.hidePopover(); }, true);
