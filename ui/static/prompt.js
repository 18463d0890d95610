/* Completes the prompt from what the chosen miniature has learnt, and says which words it never learnt.

   Runs as js_on_load of the gr.HTML below the prompt, where `element` is its outermost element. The words come from the
   server (engine/vocabulary.py) when the prompt is first used, and a prompt is read here as it is there. The box stays
   a text box, with a list beside it that the arrow keys go through: Enter or Tab takes what is chosen, Escape closes.
   Text is set as text. */

const MOST = 6;
const WORD = /[^\s,.;:!?“”"()]+/g;
const { models, offered: offeredText, ...texts } = element.querySelector('.tf-known').dataset;
const can = JSON.parse(models);
const box = () => document.querySelector('#tf-prompt textarea');
const offered = element.querySelector('#tf-offered');
const list = element.querySelector('#tf-words');
const never = element.querySelector('.tf-never');
const told = element.querySelector('.tf-unseen');

let model = null;
let known = null; // of the model, once it is here
const coming = {};

const split = (text) => text.toLowerCase().replaceAll('’', "'").match(WORD) ?? [];

const prepared = (found) => {
  const colours = Object.entries(found.colours).flat(2);
  const verbs = Object.values(found.motions).flat();
  const names = new Set([...found.also, ...found.things.map((name) => name.toLowerCase())]);
  const phrases = new Map();
  for (const [kind, some] of [['thing', names], ['motion', verbs], ['around', found.around], ['colour', colours]]) {
    for (const phrase of some) phrases.set(split(phrase).join(' '), kind);
  }
  const most = Math.max(...[...phrases.keys()].map((phrase) => phrase.split(' ').length));
  return { ...found, names, phrases, most };
};

const fetched = async (id) => {
  if (!(id in can)) return null;
  coming[id] ??= fetch(`vocabulary/${id}`).then((answer) => (answer.ok ? answer.json() : null))
    .then((found) => found && prepared(found))
    .catch((error) => {
      if (!(error instanceof TypeError)) throw error;
      delete coming[id]; // out of reach: asked again at the next word
      return null;
    });
  return coming[id];
};

/* Things and unknown words of a text; as engine/vocabulary.py reads it. */
const read = (text) => {
  const words = split(text);
  const [things, either, unknown] = [[], [], []];
  for (let at = 0; at < words.length;) {
    let length = Math.min(words.length - at, known.most);
    const said = () => words.slice(at, at + length).join(' ');
    while (length > 1 && !known.phrases.has(said())) length -= 1;
    const kind = known.phrases.get(said());
    if (kind === 'thing') things.push(said());
    else if (kind === 'colour' && known.names.has(said())) either.push(said());
    else if (!kind) unknown.push(said());
    at += length;
  }
  return { things: [...new Set(things.length ? things : either.slice(0, 1))], unknown: [...new Set(unknown)] };
};

/* Warning */

const quoted = (names) => names.map((name) => `“${name}”`).join(', ');

/* What is wrong with a prompt; while its last word is still being typed, that word is left alone. */
const wrong = (text, typing) => {
  if (!known || !text.trim()) return '';
  const { things, unknown } = read(typing ? text.replace(/[^\s,.;:!?]+$/, '') : text);
  if (unknown.length) return texts.never.replace('{words}', () => quoted(unknown));
  if (things.length > 1) return texts.several.replace('{words}', () => quoted(things));
  return things.length || typing ? '' : texts.nothing;
};

const warn = () => {
  const field = box();
  if (!field) return;
  const said = wrong(field.value, document.activeElement === field && field.selectionEnd === field.value.length);
  if (never.textContent !== said) never.textContent = said;
};

/* Completing */

let items = [];
let chosen = -1;

const article = (name) => {
  if (/^(a|an|the) /.test(name) || (name.endsWith('s') && !name.endsWith('ss'))) return name;
  return `${'aeiou'.includes(name[0]) ? 'an' : 'a'} ${name}`;
};

/* What may follow a text, each as the whole prompt. */
const endings = (text) => {
  const { things } = read(text);
  const found = [];
  const seen = new Set();
  const add = (begun, rest) => {
    const whole = begun + rest;
    if (seen.has(whole) || whole === text) return;
    seen.add(whole);
    found.push([begun, rest]);
  };
  const starts = [...text.matchAll(/(^|\s)(?=\S)/g)].map((match) => match.index + match[0].length);
  const on = text.match(/\b(?:on|against|of) (?:an? )?([a-z ]*)$/i);
  if (things.length && on) {
    for (const colour of Object.keys(known.colours)) {
      if (!colour.startsWith(on[1].toLowerCase())) continue;
      const before = text.slice(0, text.length - on[1].length).replace(/ an? $/i, ' ');
      add(`${before}${article(colour)}`, ' background');
    }
    return found;
  }
  // The longest words at the end that begin a name, a colour or a motion.
  for (const start of starts.slice(-known.most)) {
    const begun = text.slice(start).toLowerCase();
    if (begun.length < 2) continue;
    const of = things.length ? [] : [...known.things];
    const before = text.slice(0, start);
    for (const name of [...of, ...Object.values(known.motions).map((verbs) => verbs[0])]) {
      if (!name.toLowerCase().startsWith(begun)) continue;
      const bare = /(^|\s)(an?|the|of)\s$/i.test(before) || !known.names.has(name.toLowerCase());
      add(before + (bare ? name : article(name)), '');
    }
    if (found.length) break;
  }
  if (things.length && /\S$|\s$/.test(text) && !/background\W*$/i.test(text)) {
    const space = /\s$/.test(text) ? '' : ' ';
    if (!found.length && !wrong(text, false)) {
      for (const colour of Object.keys(known.colours)) add(`${text}${space}on ${article(colour)}`, ' background');
    }
  }
  return found.sort(([a, b], [c, d]) => (a + b).length - (c + d).length);
};

const mark = () => {
  [...list.children].forEach((item, index) => item.setAttribute('aria-selected', index === chosen));
  const field = box();
  if (chosen < 0) field.removeAttribute('aria-activedescendant');
  else field.setAttribute('aria-activedescendant', list.children[chosen].id);
};

const close = () => {
  if (offered.hidden && !items.length) return;
  items = [];
  chosen = -1;
  offered.hidden = true;
  told.textContent = '';
  list.replaceChildren();
  box()?.removeAttribute('aria-activedescendant');
};

const offer = () => {
  const field = box();
  const atEnd = field.selectionEnd === field.value.length;
  items = known && atEnd && field.value.trim() ? endings(field.value).slice(0, MOST) : [];
  if (!items.length) {
    close();
    return;
  }
  chosen = -1;
  list.replaceChildren(...items.map(([begun, rest], index) => {
    const item = Object.assign(document.createElement('li'), { id: `tf-word-${index}` });
    item.setAttribute('role', 'option');
    item.textContent = begun + rest;
    return item;
  }));
  mark();
  offered.hidden = false;
  told.textContent = offeredText.replace('{count}', items.length);
};

const take = (index) => {
  const field = box();
  const [begun, rest] = items[index];
  Object.getOwnPropertyDescriptor(HTMLTextAreaElement.prototype, 'value').set.call(field, begun + rest);
  field.dispatchEvent(new Event('input', { bubbles: true }));
  field.setSelectionRange(field.value.length, field.value.length);
  close();
  if (!/background$/.test(field.value)) offer();
  warn();
};

const ready = async () => {
  if (known || !model) return;
  const id = model;
  const found = await fetched(id);
  if (id === model) known = found;
};

document.addEventListener('focusin', ({ target }) => {
  if (target !== box()) return;
  target.setAttribute('aria-autocomplete', 'list');
  target.setAttribute('aria-controls', list.id);
  ready().then(warn);
});

document.addEventListener('input', async ({ target, isTrusted }) => {
  if (target !== box()) return;
  await ready();
  warn();
  if (isTrusted) offer();
});

document.addEventListener('focusout', ({ target }) => {
  if (target !== box()) return;
  close();
  setTimeout(warn);
});

// Before Gradio's own handler, for which Enter is Generate.
document.addEventListener('keydown', (event) => {
  if (event.target !== box()) return;
  const { key } = event;
  if (offered.hidden) {
    if (key === 'Enter') setTimeout(warn);
    return;
  }
  if (key === 'ArrowDown' || key === 'ArrowUp') {
    const count = items.length + 1; // one of them is none
    chosen = ((chosen + 1 + (key === 'ArrowDown' ? 1 : count - 1)) % count) - 1;
    mark();
  } else if ((key === 'Enter' || key === 'Tab') && chosen >= 0) take(chosen);
  else if (key === 'Escape') close();
  else {
    if (key === 'Enter') close();
    return;
  }
  event.preventDefault();
  event.stopPropagation();
}, true);

// Not click: the box would have lost the focus, and the list be gone.
list.addEventListener('pointerdown', (event) => {
  const item = event.target.closest('li');
  if (!item) return;
  event.preventDefault();
  take([...list.children].indexOf(item));
});

/* The model, and prompts that come otherwise than by typing */

addEventListener('twinframe-form', async ({ detail }) => {
  if (detail.model !== model) {
    model = detail.model;
    known = null;
    close();
    never.textContent = '';
  }
  // For an example no words need be fetched.
  const examples = [...document.querySelectorAll('#tf-examples button')].map((button) => button.textContent.trim());
  if (known || !examples.includes(detail.prompt.trim())) await ready();
  warn();
});
document.addEventListener('click', ({ target }) => {
  if (target.closest?.('#tf-go')) ready().then(warn);
});
