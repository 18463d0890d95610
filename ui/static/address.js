/* The page's address follows what the form asks for and what is shown, so that a reload and Back bring both back; and
   what is shown is dimmed while the form asks for something else.

   Runs as js_on_load of a gr.HTML above the tabs, where `element` is its outermost element. ui/page.py tells the form's
   values and the tabs as events of the window, and asks here what prompt and seed are to be; ui/cards.py says in
   #tf-headline what is shown. Links of this page (`?...`) are followed without loading it anew. */

const FORM = {
  prompt: 'prompt', model: 'model', precisions: 'precisions', size: 'size', recipe: 'recipe', seed: 'seed',
  steps: 'num_inference_steps', guidance: 'guidance_scale', frames: 'num_frames', batch: 'batch_size',
}; // name in the address (ui/link.py) -> field of the form
const OURS = [...Object.keys(FORM), 'recorded', 'made'];
const home = element.querySelector('[data-home]').dataset.home; // what the page shows at first, as in the address
const find = (selector) => document.querySelector(selector);
const slug = (tab) => tab.toLowerCase().replaceAll(' ', '-');

/* Typing wins over what arrives late */

let asked = true; // the server, by the opened page, a link, an example, ...: half of its answer is no state of the page
const touched = new Set();
const TYPED = { '#tf-prompt': 'prompt', '#tf-seed': 'seed' };

document.addEventListener('input', ({ target }) => {
  const within = Object.keys(TYPED).find((selector) => target.closest(selector));
  if (within) touched.add(TYPED[within]);
}, true);
document.addEventListener('click', ({ target }) => { if (target.closest('#tf-dice')) touched.add('seed'); }, true);
addEventListener('twinframe-asked', () => {
  touched.clear();
  asked = true;
});

/* What prompt and seed are to be, undefined for what stays. */
const typed = (wanted) => {
  const { prompt, seed } = wanted ? JSON.parse(wanted) : {};
  return [touched.has('prompt') ? undefined : prompt, touched.has('seed') ? undefined : seed];
};

/* One answer after the other: Gradio drops what is asked for while the last of its kind is under way, and what was found
   of an earlier form would come to stand under a later one. */

let looking = false; // what there is of the form is looked for
let again = false; // and it has changed since
let opening = false; // an address is opened
let next = null; // and another was asked for since

const look = () => {
  again = looking;
  looking = true;
  if (!again) trigger('submit');
};

const send = () => {
  opening = true;
  trigger('select', { query: next });
  next = null;
};

const ask = (query) => {
  dispatchEvent(new Event('twinframe-asked'));
  next = query || (home && `?${home}`);
  if (!opening) send();
};

/* Form and pictures belong together by now, or an answer failed. */
const answered = () => {
  looking = false;
  if (again) look();
  else if (next !== null) send();
  else {
    opening = false;
    asked = false;
    setTimeout(follow); // where nothing changes, nobody tells of it
  }
};
window.twinframe = { typed, look, answered };

/* What is shown, and whether it is what the form asks for */

let form = null;

const shown = () => {
  const made = find('#tf-headline [data-asked]');
  if (!made) return null;
  const { asked: request, address, busy, foreign } = made.dataset;
  return { request: JSON.parse(request), address, busy: busy !== undefined, foreign: foreign !== undefined };
};

/* Columns as what they stand for: those that name no recipe are by the request's. */
const resolved = ({ precisions, recipe }) => new Set((precisions ?? []).filter((name) => name !== 'bf16')
  .map((name) => (name.includes('@') || name.startsWith('bf16') ? name : name.replace(/^\w+/, `$&@${recipe}`))));

const same = ({ request }) => {
  const { height, width, ...rest } = request;
  const there = resolved(request);
  const mine = { ...form, prompt: form.prompt.trim(), seed: form.seed === null ? null : Number(form.seed) };
  return mine.size === `${width}x${height}`
    && ['prompt', 'model', 'seed', 'num_inference_steps', 'guidance_scale', 'num_frames', 'batch_size']
      .every((name) => mine[name] === rest[name])
    && [...resolved(mine)].every((name) => there.has(name));
};

const say = (made, fresh) => {
  const note = find('#tf-stale');
  const results = find('#tf-results');
  if (!note) return;
  const stale = made !== null && !fresh;
  const kind = !stale ? '' : made.foreign ? 'foreign' : made.busy ? 'busy'
    : made.request.prompt === form.prompt.trim() ? 'settings' : 'prompt';
  results.toggleAttribute('data-stale', stale && !made.foreign);
  note.hidden = !stale;
  const [act, rest] = stale
    ? [made.foreign || made.busy ? '' : note.dataset.act, note.dataset[kind].replace('{prompt}', () => made.request.prompt)]
    : ['', ''];
  if (note.firstChild.textContent !== act) note.firstChild.textContent = act;
  if (note.lastChild.textContent !== rest) note.lastChild.textContent = rest;
};

/* The address */

let settled = !location.search; // whether the address is that of something finished, which Back is to bring back

const wanted = (made, fresh) => {
  const exact = fresh && made.request.recipe === form.recipe
    && resolved(made.request).size === resolved(form).size;
  if (made && (exact || made.foreign) && made.address.startsWith('recorded=')) {
    return new URLSearchParams(made.address === home ? '' : made.address);
  }
  const query = new URLSearchParams();
  for (const [name, field] of Object.entries(FORM)) query.set(name, form[field] ?? '');
  query.set('precisions', form.precisions?.join(',') || 'bf16');
  if (fresh && made.address.startsWith('made=')) query.set(...made.address.split('='));
  return query;
};

const ours = (search) => {
  const query = new URLSearchParams(search);
  for (const name of [...query.keys()]) if (!OURS.includes(name)) query.delete(name);
  query.sort();
  return query.toString();
};

const go = (query, hash, anew) => {
  const address = new URL(location.href);
  for (const name of OURS) address.searchParams.delete(name);
  for (const [name, value] of query) address.searchParams.set(name, value);
  address.hash = hash;
  history[anew ? 'pushState' : 'replaceState'](null, '', address);
};

const follow = () => {
  if (!form) return;
  const made = shown();
  const fresh = made !== null && same(made);
  say(made, fresh);
  if (asked) return;
  const query = wanted(made, fresh);
  if (ours(query) !== ours(location.search)) go(query, location.hash, settled);
  settled = made === null || (fresh && !made.busy) || made.foreign;
};

addEventListener('twinframe-form', ({ detail }) => {
  form = detail;
  follow();
});

let seen = null;
new MutationObserver(() => {
  const now = JSON.stringify(shown());
  if (now === seen) return;
  seen = now;
  follow();
}).observe(document.body, {
  childList: true,
  subtree: true,
  attributeFilter: ['data-asked', 'data-address', 'data-busy', 'data-foreign'],
});

/* Links of this page, Back, and tabs */

const open = (tab) => {
  const buttons = [...document.querySelectorAll('#tf-tabs :is([role=tab], .overflow-dropdown button)')];
  (buttons.find((button) => slug(button.textContent.trim()) === tab) ?? buttons[0])?.click();
};

let tab = 'compare';

const opened = (name) => {
  tab = slug(name);
  const hash = tab === 'compare' ? '' : `#${tab}`;
  if (location.hash !== hash) go(new URLSearchParams(location.search), hash, true);
};
addEventListener('twinframe-tab', ({ detail }) => opened(detail));

document.addEventListener('click', (event) => {
  const link = event.target.closest?.('.gradio-container a[href^="?"]');
  if (!link || event.button || event.ctrlKey || event.metaKey || event.shiftKey || event.altKey) return;
  event.preventDefault();
  const query = link.getAttribute('href');
  settled = false;
  go(new URLSearchParams(query), '', true);
  open('compare');
  ask(query);
  scrollTo({ top: 0 });
});

const arrive = () => {
  const at = location.hash.slice(1) || 'compare';
  if (at !== tab) open(at);
};
addEventListener('popstate', () => {
  arrive();
  settled = false;
  ask(location.search);
});

const begin = () => {
  const chosen = find('#tf-tabs [role=tab][aria-selected=true]');
  if (!chosen) requestAnimationFrame(begin);
  else if (location.hash) arrive();
  else opened(chosen.textContent.trim()); // who is quick has chosen one already
};
begin();
