/* What was made in this browser, kept in its local storage and nowhere else: a link with every setting, and two small
   pictures.

   Runs twice: as js_on_load of the gr.HTML with the verdict, which tells of a comparison that has ended, and of the
   gallery's, which shows them. `element` is the outermost element, `watch` tells of a new value. Text is set as text. */

const KEY = 'twinframe-history';
const MOST = 24;
const SIDE = 96; // pixels

const read = () => {
  try {
    const kept = JSON.parse(localStorage.getItem(KEY)) ?? [];
    return Array.isArray(kept) ? kept : [];
  } catch (error) {
    if (error instanceof SyntaxError) return []; // somebody else's, or damaged
    throw error;
  }
};

const write = (kept) => {
  try {
    localStorage.setItem(KEY, JSON.stringify(kept));
  } catch (error) {
    if (error.name !== 'QuotaExceededError') throw error;
    if (kept.length) write(kept.slice(0, -1));
  }
  dispatchEvent(new Event(KEY));
};

/* Keeping */

const small = (source) => {
  const canvas = Object.assign(document.createElement('canvas'), { width: SIDE, height: SIDE });
  const [width, height] = [source.naturalWidth || source.videoWidth, source.naturalHeight || source.videoHeight];
  const side = Math.min(width, height);
  canvas.getContext('2d')
    .drawImage(source, (width - side) / 2, (height - side) / 2, side, side, 0, 0, SIDE, SIDE);
  return canvas.toDataURL('image/jpeg', 0.8);
};

/* A picture, or the first frame of a clip, as a small data URL; null if it cannot be had any more. */
const thumbnail = (address) => new Promise((resolve) => {
  const video = address.endsWith('.mp4');
  const source = document.createElement(video ? 'video' : 'img');
  source.addEventListener(video ? 'loadeddata' : 'load', () => resolve(small(source)), { once: true });
  source.addEventListener('error', () => resolve(null), { once: true });
  Object.assign(source, { muted: true, preload: 'auto', src: address });
});

const keep = async () => {
  const made = element.querySelector('[data-made]');
  if (!made) return;
  const { made: when, query, words, files } = made.dataset;
  if (read().some((one) => one.when === when && one.query === query)) return;
  const prompt = element.querySelector('.tf-origin q').textContent;
  const pictures = await Promise.all(JSON.parse(files).map(thumbnail));
  write([{ when, query, words, prompt, pictures }, ...read()].slice(0, MOST));
};

/* Showing */

const show = () => {
  const section = element.querySelector('#tf-mine');
  const kept = read();
  section.hidden = !kept.length;
  section.querySelector('.tf-made').replaceChildren(...kept.map(({ query, prompt, words, pictures }) => {
    const link = Object.assign(document.createElement('a'), { className: 'tf-tile', href: query });
    const halves = Object.assign(document.createElement('span'), { className: 'tf-halves tf-square' });
    halves.append(...['tf-left', 'tf-right'].flatMap((className, i) =>
      (pictures[i] ? [Object.assign(document.createElement('img'), { className, src: pictures[i], alt: '' })] : [])));
    const said = [['tf-prompt', prompt], ['tf-small', words]].map(([className, textContent]) =>
      Object.assign(document.createElement('span'), { className, textContent }));
    link.append(halves, ...said);
    const item = document.createElement('li');
    item.append(link);
    return item;
  }));
};

if (element.querySelector('#tf-mine')) {
  element.querySelector('.tf-forget').addEventListener('click', () => write([]));
  addEventListener(KEY, show);
  addEventListener('storage', (event) => { if (event.key === KEY) show(); }); // another tab
  show();
} else watch('value', keep);
