/* The Blind test tab: keys for its buttons, and one zoom for all of its pictures.

   Runs as js_on_load of the gr.HTML above the form, where `element` is its outermost element. Knows no answer: the
   server has it. */

const BY = 3; // times, where a picture is clicked
const STEP = 0.1; // of a frame, an arrow key
const panel = element.closest('[role=tabpanel]') ?? document;
const place = () => panel.querySelector('#tf-blind-question');
const at = { zoom: 1, x: 0, y: 0 }; // the upper left corner, in widths and heights of a frame

const apply = () => {
  for (const axis of ['x', 'y']) {
    at[axis] = Math.min(0, Math.max(1 - at.zoom, at[axis]));
    place().style.setProperty(`--${axis}`, at[axis]);
  }
  place().style.setProperty('--zoom', at.zoom);
  place().toggleAttribute('data-zoomed', at.zoom > 1);
};

/* In at a point of the frame, 0 to 1 in both directions, or out again. */
const toggle = (x = 0.5, y = 0.5) => {
  const zoom = at.zoom > 1 ? 1 : BY;
  Object.assign(at, { zoom, x: x * (1 - zoom), y: y * (1 - zoom) });
  apply();
};

panel.addEventListener('click', (event) => {
  const frame = event.target.closest('.tf-blind-frame');
  if (!frame || frame.querySelector('video')) return;
  const box = frame.getBoundingClientRect();
  toggle((event.clientX - box.left) / box.width, (event.clientY - box.top) / box.height);
});

// While zoomed, every picture follows the pointer.
panel.addEventListener('pointermove', (event) => {
  const frame = event.target.closest('.tf-blind-frame');
  if (!frame || at.zoom === 1) return;
  const box = frame.getBoundingClientRect();
  at.x = ((event.clientX - box.left) / box.width) * (1 - at.zoom);
  at.y = ((event.clientY - box.top) / box.height) * (1 - at.zoom);
  apply();
});

// With new pictures the zoom is forgotten; with the button that was pressed, which goes, the focus is lost.
let seen = null;
new MutationObserver(() => {
  const source = place().querySelector('.tf-blind-move > *')?.src;
  if (source && source !== seen) {
    seen = source;
    at.zoom = 1;
    apply();
  }
  if (document.activeElement === document.body && place().checkVisibility()) {
    panel.querySelector('#tf-blind-next')?.focus({ preventScroll: true });
  }
}).observe(panel, { childList: true, subtree: true });

const press = (name) => panel.querySelector(`#tf-blind-${name}`)?.click();
const KEYS = { a: () => press('a'), b: () => press('b'), n: () => press('next'), z: () => toggle() };
const ARROWS = { ArrowLeft: [1, 0], ArrowRight: [-1, 0], ArrowUp: [0, 1], ArrowDown: [0, -1] };

document.addEventListener('keydown', (event) => {
  if (!element.isConnected || !element.checkVisibility() || event.ctrlKey || event.metaKey || event.altKey) return;
  const { target, key } = event;
  if (target.matches('textarea, input:not([type=radio], [type=range])')) return;
  const frame = target.closest('.tf-blind-frame');
  if (KEYS[key]) KEYS[key]();
  else if (frame && (key === 'Enter' || key === ' ') && !frame.querySelector('video')) toggle();
  else if (frame && at.zoom > 1 && ARROWS[key]) {
    at.x += STEP * ARROWS[key][0];
    at.y += STEP * ARROWS[key][1];
    apply();
  } else return;
  event.preventDefault();
  event.stopPropagation();
}, true);
