/* On stage: one key takes everything but the prompt, the verdict and the pictures away, and the rest has a key each.

   Runs as js_on_load of a gr.HTML whose value tells the server that the page is on stage, so that a run that fails there
   falls back to a recording. The keys press what the page has anyway; single letters mean something on stage alone,
   where nothing is being written. ui/static/viewer.js and ui/static/player.js have keys of their own: F, space, arrows, the zoom. */

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
  find('#tf-tabs button[role=tab]')?.click(); // the first is the one with the pictures
  document.activeElement?.blur();
  scrollTo({ top: 0 });
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
  f: () => document.body.dispatchEvent(new KeyboardEvent('keydown', { key: 'f', bubbles: true })),
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
  if (writes || (!onStage() && key !== 'p') || key === 'f' || !ACTS[key]) return;
  event.preventDefault();
  ACTS[key]();
});

document.addEventListener('click', (event) => {
  const key = event.target.closest('[data-key]')?.dataset.key;
  if (key) ACTS[key]();
});

if (new URLSearchParams(location.search).get('stage') === '1') enter(true);
