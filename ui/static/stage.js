/* On stage: one key takes everything but the prompt, the verdict and the pictures away, and the rest has a key each.

   Runs as js_on_load of a gr.HTML whose value tells the server that the page is on stage, so that a run that fails there
   falls back to a recording. The keys press what the page has anyway; single letters mean something on stage alone,
   where nothing is being written. ui/static/viewer.js and ui/static/player.js have keys of their own: F, space, arrows,
   the zoom; they are passed on to these wherever the focus is.

   A connection that is lost in the middle of a run shows the recorded run that the server sent with it (#tf-net). The run
   goes on; when the server answers again, the page is loaded anew, and its address names the run. */

const help = element.querySelector('#tf-keys');
const find = (selector) => document.querySelector(selector);
const onStage = () => document.body.hasAttribute('data-stage');

const enter = (on) => {
  document.body.toggleAttribute('data-stage', on);
  props.value = on ? 'stage' : '';
  const address = new URL(location.href);
  if (on) address.searchParams.set('stage', '1');
  else address.searchParams.delete('stage');
  history.replaceState(null, '', address);
  if (!on && help.matches(':popover-open')) help.hidePopover();
  if (on) watchConnection();
  fit();
  find('#tf-tabs button[role=tab]')?.click(); // the first is the one with the pictures
  document.activeElement?.blur();
  scrollTo({ top: 0 });
};

/* The box has another type size on stage: Gradio sets its height when something is typed. */
const fit = () => {
  const prompt = find('#tf-prompt textarea');
  if (!prompt) return;
  prompt.style.height = '';
  prompt.dispatchEvent(new Event('input', { bubbles: true }));
};

const view = (name) => {
  find(`input[name=tf-view][value=${name}]`)?.click();
  document.activeElement?.blur();
  if (name === 'slider') find('.tf-pair:not([hidden]) .tf-split')?.focus({ preventScroll: true });
};

const other = () => {
  const inputs = [...document.querySelectorAll('input[name=tf-above]')];
  inputs[(inputs.findIndex((input) => input.checked) + 1) % inputs.length]?.click();
  document.activeElement?.blur();
};

const next = () => {
  const examples = [...document.querySelectorAll('#tf-examples button')];
  if (!examples.length) return;
  const prompt = find('#tf-prompt textarea').value;
  const at = examples.findIndex((example) => example.textContent.trim() === prompt.trim());
  examples[(at + 1) % examples.length].click();
};

const edit = () => {
  const prompt = find('#tf-prompt textarea');
  prompt.focus();
  prompt.select();
};

const back = () => {
  dispatchEvent(new Event('twinframe-asked'));
  trigger('select', { wanted: 'recorded' });
};

const VIEWERS = ['f', '+', '-', '0']; // the viewer answers these
const pass = (key) => document.body.dispatchEvent(new KeyboardEvent('keydown', { key, bubbles: true }));
const worst = () => find(find('#tf-results').hasAttribute('data-zoomed') ? '[data-act=reset]' : '[data-act=worst]').click();

/* The slider moves by the arrow keys wherever the focus is. */
const STEPS = { ArrowLeft: -2, ArrowRight: 2 };
const slide = (key) => {
  const results = find('#tf-results');
  const split = find('.tf-pair:not([hidden]) .tf-split');
  if (results?.dataset.view !== 'slider' || results.hasAttribute('data-zoomed') || !split) return false;
  split.focus({ preventScroll: true });
  split.value = Number(split.value) + STEPS[key];
  split.dispatchEvent(new Event('input', { bubbles: true }));
  return true;
};

const ACTS = {
  g: () => find('#tf-go').click(),
  x: () => find('#tf-stop').click(),
  n: next,
  e: edit,
  r: () => back(),
  b: () => view('side'),
  s: () => view('slider'),
  d: () => view('difference'),
  o: other,
  w: worst,
  f: () => pass('f'),
  '+': () => pass('+'),
  '-': () => pass('-'),
  '?': () => help.togglePopover(),
  p: () => enter(!onStage()),
};

document.addEventListener('keydown', (event) => {
  const { target, key } = event;
  if (!element.isConnected || event.ctrlKey || event.metaKey || event.altKey) return;
  const writes = target.matches('textarea, input:not([type=radio], [type=range], [type=checkbox])');
  if (key === 'Escape' && onStage()) {
    if (writes) target.blur();
    else if (!help.matches(':popover-open')) enter(false); // the browser closes an open popover by itself
    return;
  }
  if (writes || (!onStage() && key !== 'p')) return;
  const seen = target === document.body || find('#tf-results').contains(target); // by the viewer
  if (STEPS[key]) {
    if (target.matches('.tf-split, [type=range]') || !slide(key)) return;
  } else if (VIEWERS.includes(key)) {
    if (seen) return;
    pass(key);
  } else if (ACTS[key]) ACTS[key]();
  else return;
  event.preventDefault();
});

document.addEventListener('click', (event) => {
  const key = event.target.closest('[data-key]')?.dataset.key;
  if (key) ACTS[key]();
});

/* The connection */

const EVERY = 700;
const PATIENCE = 1800; // milliseconds; with those between two looks, less than three seconds
const note = element.querySelector('#tf-lost');
let watching = false;
let lost = false;

const answers = async () => {
  try {
    await fetch('warming', { method: 'HEAD', signal: AbortSignal.timeout(PATIENCE), cache: 'no-store' });
    return true;
  } catch (error) {
    if (error instanceof TypeError || error.name === 'TimeoutError') return false;
    throw error;
  }
};

const connected = (now) => {
  if (now === !lost) return;
  lost = !now;
  const midway = find('#tf-headline [data-busy]') && find('#tf-net .tf-stage');
  if (lost) {
    document.body.toggleAttribute('data-lost', Boolean(midway));
    note.textContent = midway ? '' : note.dataset.said;
    if (midway) document.querySelectorAll('#tf-net video').forEach((clip) => { clip.loop = true; clip.play(); });
  } else if (document.body.hasAttribute('data-lost')) location.reload(); // to the run, which its address names
  else note.textContent = '';
};

const watchConnection = async () => {
  if (watching) return;
  watching = true;
  while (onStage() && element.isConnected) {
    connected(await answers());
    await new Promise((go) => { setTimeout(go, EVERY); });
  }
  watching = false;
};

/* A page that goes says which run it leaves: a reload comes back to it, a closed tab does not. */
addEventListener('pagehide', () => {
  const address = find('#tf-headline [data-busy]')?.dataset.address;
  if (address?.startsWith('made=')) navigator.sendBeacon(`gone/${address.slice(5)}`);
});

if (new URLSearchParams(location.search).get('stage') === '1') enter(true);
