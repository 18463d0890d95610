/* Looking closely at results: one zoom for all pictures, the split of two, flicker, and where they differ most.

   Runs as js_on_load of the gr.HTML with the pairs, where `element` is its outermost element and `watch` tells of a
   new value. Gradio changes what is inside in place, so the state lives on #tf-results, which it leaves alone: the
   chosen view, which side of a flicker is shown, and the zoom as CSS variables, by which every picture moves at once.
   No text of a user enters here. */

const results = element.closest('#tf-results');
const MOST = 16; // times
const BLOCK = 8; // a side has this many windows; the worst of all such windows is looked for
const BRIGHTEST = { pixels: 64, lpips: 0.5 }; // of 255, and LPIPS: what is at the end of the colour scale
const zoomed = { zoom: 1, x: 0, y: 0 }; // x, y: where the upper left corner lies, in widths and heights of a frame
const kept = {};

const frameOf = (node) => node.closest?.('.tf-frame');
const pairShown = () => [...element.querySelectorAll('.tf-pair')].find((pair) => !pair.hidden);

/* Zoom */

const apply = () => {
  const { zoom } = zoomed;
  for (const axis of ['x', 'y']) {
    zoomed[axis] = Math.min(0, Math.max(1 - zoom, zoomed[axis]));
    results.style.setProperty(`--${axis}`, zoomed[axis]);
  }
  results.style.setProperty('--zoom', zoom);
  results.toggleAttribute('data-zoomed', zoom > 1);
  results.toggleAttribute('data-pixels', zoom >= 3);
  const shown = results.querySelector('.tf-zoomed');
  if (shown) shown.textContent = `${Math.round(zoom * 10) / 10}×`;
};

/* Zoom by a factor around a point of the frame, 0 to 1 in both directions. */
const zoomBy = (factor, x = 0.5, y = 0.5) => {
  const zoom = Math.min(MOST, Math.max(1, zoomed.zoom * factor));
  const scale = zoom / zoomed.zoom;
  zoomed.x = x - (x - zoomed.x) * scale;
  zoomed.y = y - (y - zoomed.y) * scale;
  zoomed.zoom = zoom;
  apply();
};

const pan = (x, y) => {
  zoomed.x += x;
  zoomed.y += y;
  apply();
};

const reset = () => {
  zoomed.zoom = 1;
  apply();
};

const within = (frame, event) => {
  const box = frame.getBoundingClientRect();
  return { x: (event.clientX - box.left) / box.width, y: (event.clientY - box.top) / box.height, box };
};

/* With Ctrl, which is also how a pinch on a touchpad arrives; without, once a picture was clicked or is zoomed, so that
   the page can be scrolled past the pictures. */
results.addEventListener('wheel', (event) => {
  const frame = frameOf(event.target);
  if (!frame || (!event.ctrlKey && zoomed.zoom === 1 && !frame.contains(document.activeElement))) return;
  if (event.deltaY > 0 && zoomed.zoom === 1 && !event.ctrlKey) return;
  event.preventDefault();
  const { x, y } = within(frame, event);
  zoomBy(Math.exp(-event.deltaY * (event.deltaMode === 1 ? 0.05 : 0.002)), x, y);
}, { passive: false });

/* Drag, pinch, and the split of a slider */

const fingers = new Map();
let drag = null;

const splitAt = (frame, event) => {
  const split = frame.querySelector('.tf-split');
  split.value = 100 * within(frame, event).x;
  split.dispatchEvent(new Event('input', { bubbles: true }));
};

results.addEventListener('pointerdown', (event) => {
  const frame = frameOf(event.target);
  if (!frame || event.button !== 0) return;
  fingers.set(event.pointerId, event);
  if (fingers.size > 1) return;
  const split = results.dataset.view === 'slider' ? frame.querySelector('.tf-split') : null;
  const { x, box } = within(frame, event);
  const near = split && (zoomed.zoom === 1 || Math.abs(x - split.value / 100) * box.width < 24);
  drag = { frame, split: near, moved: false, x: event.clientX, y: event.clientY };
  (split ?? frame).focus({ preventScroll: true });
  if (near) {
    event.preventDefault();
    splitAt(frame, event);
  }
});

results.addEventListener('pointermove', (event) => {
  const before = fingers.get(event.pointerId);
  if (!before || !drag) return;
  fingers.set(event.pointerId, event);
  const { frame } = drag;
  const { box } = within(frame, event);
  if (!drag.moved && Math.hypot(event.clientX - drag.x, event.clientY - drag.y) < 4 && fingers.size === 1) return;
  if (!drag.moved) frame.setPointerCapture(event.pointerId); // not before: a click would lose its target
  drag.moved = true;
  if (fingers.size > 1) {
    const other = [...fingers.values()].find((finger) => finger.pointerId !== event.pointerId);
    const apart = (one) => Math.hypot(one.clientX - other.clientX, one.clientY - other.clientY) || 1;
    const middle = { clientX: (event.clientX + other.clientX) / 2, clientY: (event.clientY + other.clientY) / 2 };
    const { x, y } = within(frame, middle);
    zoomBy(apart(event) / apart(before), x, y);
  } else if (drag.split) splitAt(frame, event);
  else pan((event.clientX - before.clientX) / box.width, (event.clientY - before.clientY) / box.height);
});

const lift = (event) => {
  fingers.delete(event.pointerId);
  if (!fingers.size && drag && !drag.moved && event.type === 'pointerup' && !drag.split) clicked(drag.frame);
  if (!fingers.size) setTimeout(() => { drag = null; }); // after the click that follows
};
addEventListener('pointerup', lift);
addEventListener('pointercancel', lift);

// A drag is no click, which would play a clip.
results.addEventListener('click', (event) => {
  if (drag?.moved && frameOf(event.target)) event.stopPropagation();
}, true);

results.addEventListener('dblclick', (event) => {
  const frame = frameOf(event.target);
  if (!frame || event.target.matches('video') || results.dataset.view === 'flicker') return;
  const { x, y } = within(frame, event);
  if (zoomed.zoom > 1) reset();
  else zoomBy(3, x, y);
});

results.addEventListener('dragstart', (event) => {
  if (frameOf(event.target)) event.preventDefault();
});

/* Views */

const choose = (view) => {
  const input = results.querySelector(`input[name=tf-view][value=${view}]`);
  input.checked = true;
  show(view);
};

const show = (view) => {
  results.dataset.view = view;
  measure();
};

const flip = () => results.toggleAttribute('data-flipped');
const clicked = (frame) => {
  if (results.dataset.view === 'flicker' && frame.closest('.tf-pair') && !frame.querySelector('video')) flip();
};

const inputsOf = (name) => [...element.querySelectorAll(`input[name=${name}]`)];
const checkedOf = (name) => inputsOf(name).find((input) => input.checked)?.value ?? 0;

const chosen = (name) => {
  const inputs = inputsOf(name);
  const input = inputs.find((i) => i.value === kept[name]) ?? inputs.find((i) => i.defaultChecked);
  if (input) input.checked = true;
  return input?.value ?? 0;
};

/* Of a pair the earlier column lies below. What was chosen stays; the other one makes way where it has to. The choices
   below are all columns but the last, those above all but the first. */
const pick = (name, value) => {
  const [below, above] = ['tf-below', 'tf-above'].map((each) => inputsOf(each).map((input) => input.value));
  const [b, a] = name === 'tf-below' ? [below.indexOf(value), above.indexOf(checkedOf('tf-above'))]
    : [below.indexOf(checkedOf('tf-below')), above.indexOf(value)];
  kept['tf-below'] = below[name === 'tf-below' ? b : Math.min(a, b)];
  kept['tf-above'] = above[name === 'tf-above' ? a : Math.max(a, b)];
};

/* Which map of the pair is shown: there are LPIPS maps of differences from bf16 alone. */
const kindShown = () => {
  const wanted = chosen('tf-kind') || 'pixels';
  const lpips = element.querySelector('input[name=tf-kind][value=lpips]');
  if (!lpips) return 'pixels';
  lpips.disabled = !pairShown()?.querySelector('.tf-map').dataset.lpips;
  if (!lpips.disabled) return wanted;
  element.querySelector('input[name=tf-kind][value=pixels]').checked = true;
  return 'pixels';
};

const PAIR = ['tf-below', 'tf-above', 'tf-picture'];
const sync = () => {
  const pairs = [...element.querySelectorAll('.tf-pair')];
  let shown = PAIR.map(chosen).join('/');
  if (!pairs.some((pair) => pair.dataset.pair === shown)) { // what was kept does not go together here
    PAIR.forEach((name) => inputsOf(name).forEach((input) => { input.checked = input.defaultChecked; }));
    shown = PAIR.map(checkedOf).join('/');
  }
  pairs.forEach((pair) => { pair.hidden = pair.dataset.pair !== shown; });
  results.dataset.kind = kindShown();
  measure();
};

// On the way down, so that the player finds the new pair in its place.
results.addEventListener('change', (event) => {
  const { name, value } = event.target;
  if (name === 'tf-view') {
    show(value);
    pairShown()?.querySelector('.tf-layers').scrollIntoView({ block: 'nearest' }); // nothing where no pair is looked at
  } else if (['tf-below', 'tf-above', 'tf-picture', 'tf-kind'].includes(name)) {
    if (name === 'tf-below' || name === 'tf-above') pick(name, value);
    else kept[name] = value;
    sync();
  }
}, true);

results.addEventListener('input', (event) => {
  if (!event.target.matches('.tf-split')) return;
  event.target.closest('.tf-pair').style.setProperty('--at', `${event.target.value}%`);
});

/* Where two pictures differ */

const pixels = (source) => {
  const canvas = document.createElement('canvas');
  canvas.width = source.naturalWidth || source.videoWidth;
  canvas.height = source.naturalHeight || source.videoHeight;
  const context = canvas.getContext('2d', { willReadFrequently: true });
  context.drawImage(source, 0, 0);
  return context.getImageData(0, 0, canvas.width, canvas.height);
};

/* Black, violet, orange, white: rises in lightness throughout. */
const STOPS = [[0, 0, 0], [74, 20, 110], [190, 55, 85], [249, 142, 9], [252, 255, 200]];
const colour = (part) => {
  const at = Math.min(1, part) * (STOPS.length - 1);
  const low = Math.min(STOPS.length - 2, Math.floor(at));
  return STOPS[low].map((from, i) => from + (STOPS[low + 1][i] - from) * (at - low));
};
const SCALE = Array.from({ length: 256 }, (_, level) => colour(level / 255));

/* |a - b| averaged over red, green and blue, a pixel each. */
const difference = (a, b) => {
  const each = new Float32Array(a.width * a.height);
  for (let i = 0, at = 0; i < each.length; i += 1, at += 4) {
    each[i] = (Math.abs(a.data[at] - b.data[at]) + Math.abs(a.data[at + 1] - b.data[at + 1])
      + Math.abs(a.data[at + 2] - b.data[at + 2])) / 3;
  }
  return each;
};

/* A map's mean, and the window of 1/BLOCK of each side where it is largest. */
const weighed = (each, width, height) => {
  const sums = new Float64Array((width + 1) * (height + 1)); // sums over all that is above and left
  for (let y = 0, i = 0; y < height; y += 1) {
    for (let x = 0, row = 0; x < width; x += 1, i += 1) {
      row += each[i];
      sums[(y + 1) * (width + 1) + x + 1] = sums[y * (width + 1) + x + 1] + row;
    }
  }
  const [w, h] = [Math.ceil(width / BLOCK), Math.ceil(height / BLOCK)];
  const sum = (x, y, right, below) =>
    sums[below * (width + 1) + right] - sums[y * (width + 1) + right] - sums[below * (width + 1) + x]
    + sums[y * (width + 1) + x];
  const worst = { x: 0, y: 0, w, h, mean: -1 };
  const step = Math.max(1, Math.floor(w / 8));
  for (let y = 0; y + h <= height; y += step) {
    for (let x = 0; x + w <= width; x += step) {
      const mean = sum(x, y, x + w, y + h) / (w * h);
      if (mean > worst.mean) Object.assign(worst, { x, y, mean });
    }
  }
  return { each, width, height, worst, mean: sum(0, 0, width, height) / (width * height) };
};

/* A pair's two pictures or current frames, when both are there. */
const sources = (pair) => {
  const both = [...pair.querySelectorAll('.tf-layer :is(img, video)')];
  return both.every((one) => (one.tagName === 'IMG' ? one.complete && one.naturalWidth : one.readyState > 1)) && both;
};

/* LPIPS maps, those of a clip's frames one below the other, by their address; `coming`: those asked for. */
const maps = new Map();
const coming = new Map();
const fetched = async (address) => {
  const image = Object.assign(new Image(), { src: address });
  await image.decode();
  maps.set(address, pixels(image));
  measure();
};
const loaded = (pair) => {
  const { lpips } = pair.querySelector('.tf-map').dataset;
  if (lpips && !coming.has(lpips)) coming.set(lpips, fetched(lpips).catch(console.warn));
  return coming.get(lpips);
};

/* Which frame of a clip is shown; 0 of a picture. */
const frameShown = (pair, source) => {
  const player = pair.querySelector('.tf-player');
  if (!player) return 0;
  return Math.min(player.dataset.frames - 1, Math.floor(source.currentTime * player.dataset.rate + 0.01));
};

/* The LPIPS map of the frame that is shown; null while it is on its way. */
const felt = (pair, frame) => {
  const { lpips, top, scores } = pair.querySelector('.tf-map').dataset;
  const all = maps.get(lpips);
  if (!all) return null;
  const [width, count] = [all.width, JSON.parse(scores)];
  const height = all.height / count.length;
  const each = new Float32Array(width * height);
  for (let i = 0, at = 4 * frame * each.length; i < each.length; i += 1, at += 4) each[i] = (all.data[at] * top) / 255;
  return { ...weighed(each, width, height), mean: count[frame] };
};

const compared = new WeakMap();
const compare = (pair) => {
  const both = sources(pair);
  if (!both) return null;
  const { kind } = results.dataset;
  const key = both.map((one) => one.currentSrc + (one.currentTime ?? '')).join() + kind;
  if (compared.get(pair)?.key !== key) {
    let found = null;
    if (kind === 'lpips') found = felt(pair, frameShown(pair, both[0]));
    else {
      const [a, b] = both.map(pixels);
      found = weighed(difference(a, b), a.width, a.height);
    }
    if (!found) {
      loaded(pair);
      return null;
    }
    compared.set(pair, { key, ...found });
  }
  return compared.get(pair);
};

const crop = (canvas, source, { x, y, w, h }) => {
  canvas.width = w;
  canvas.height = h;
  canvas.getContext('2d').drawImage(source, x, y, w, h, 0, 0, w, h);
};

/* Draws the difference of the pair that is shown, if that is what is looked at. */
const measure = () => {
  const pair = pairShown();
  if (!pair || results.dataset.view !== 'difference') return;
  const found = compare(pair);
  if (!found) return;
  const { each, width, height, worst, mean, key } = found;
  const map = pair.querySelector('.tf-map');
  if (map.key === key) return;
  Object.assign(map, { width, height, key });
  const image = new ImageData(width, height);
  const { kind } = results.dataset;
  for (let i = 0; i < each.length; i += 1) {
    const [red, green, blue] = SCALE[Math.min(255, Math.round((255 * each[i]) / BRIGHTEST[kind]))];
    image.data.set([red, green, blue, 255], 4 * i);
  }
  map.getContext('2d').putImageData(image, 0, 0);
  const spot = pair.querySelector('.tf-spot');
  Object.assign(spot.style, {
    left: `${(100 * worst.x) / width}%`,
    top: `${(100 * worst.y) / height}%`,
    width: `${(100 * worst.w) / width}%`,
    height: `${(100 * worst.h) / height}%`,
  });
  const both = sources(pair);
  const of = (both[0].naturalWidth ?? both[0].videoWidth) / width; // pixels of the picture, for one of the map
  const [x, y, w, h] = [worst.x, worst.y, worst.w, worst.h].map((one) => Math.round(one * of));
  pair.querySelectorAll('.tf-crop').forEach((canvas, i) => crop(canvas, both[i], { x, y, w, h }));
  const said = pair.querySelector('.tf-worst');
  const digits = (value) => value.toFixed(kind === 'pixels' ? 1 : 3);
  said.textContent = said.dataset[kind].replace('{worst}', digits(worst.mean)).replace('{mean}', digits(mean))
    .replace('{size}', `${w} × ${h}`);
};

/* Zoom to the worst spot: of the pair that is shown, or side by side of all pairs with the reference. */
const toWorst = async () => {
  const one = pairShown();
  const side = results.dataset.view === 'side' || !results.dataset.view;
  const pairs = side ? [...element.querySelectorAll('.tf-pair[data-pair^="bf16/"]')] : [one];
  if (results.dataset.kind === 'lpips') await Promise.all(pairs.filter(Boolean).map(loaded));
  const found = pairs.filter(Boolean).map(compare).filter(Boolean);
  if (!found.length) return;
  const { worst, width, height } = found.reduce((a, b) => (b.worst.mean > a.worst.mean ? b : a));
  zoomed.zoom = BLOCK / 2;
  zoomed.x = 0.5 - (zoomed.zoom * (worst.x + worst.w / 2)) / width;
  zoomed.y = 0.5 - (zoomed.zoom * (worst.y + worst.h / 2)) / height;
  apply();
};

// Pictures and frames that arrive later; these events do not bubble.
for (const name of ['load', 'loadeddata', 'seeked', 'timeupdate']) element.addEventListener(name, measure, true);

/* Buttons and keys */

/* The clips that are seen; their own button may lie below the window. */
const play = () => [...results.querySelectorAll('.tf-play')].find((button) => button.checkVisibility())?.click();

const ACTS = { play, in: () => zoomBy(1.5), out: () => zoomBy(1 / 1.5), reset, worst: toWorst, flip };
results.addEventListener('click', (event) => {
  const button = event.target.closest('[data-act]');
  if (button) ACTS[button.dataset.act]();
});

const KEYS = { '+': ACTS.in, '=': ACTS.in, '-': ACTS.out, 0: reset };
const ARROWS = { ArrowLeft: [0.1, 0], ArrowRight: [-0.1, 0], ArrowUp: [0, 0.1], ArrowDown: [0, -0.1] };
document.addEventListener('keydown', (event) => {
  if (!results.isConnected || event.ctrlKey || event.metaKey || event.altKey || !results.checkVisibility()) return;
  const { target, key } = event;
  const inside = results.contains(target);
  if ((!inside && target !== document.body) || target.matches('input:not([type=radio], [type=range]), textarea')) return;
  const frame = frameOf(target);
  if (key === 'f' && element.querySelector('.tf-pair')) {
    if (results.dataset.view === 'flicker') flip();
    else choose('flicker');
  } else if (KEYS[key]) KEYS[key]();
  else if (frame && zoomed.zoom > 1 && ARROWS[key] && (event.shiftKey || !target.matches('.tf-split'))) {
    pan(...ARROWS[key]);
    event.stopPropagation(); // from the player, which would go frame by frame
  } else return;
  event.preventDefault();
}, true);

watch('value', sync);
sync();
apply();
// Two at once on a screen that is too narrow for two beside each other.
if (!results.dataset.view && matchMedia('(max-width: 640px)').matches) choose('slider');
