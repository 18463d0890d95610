/* Plays the clips of one .tf-player together: one play button and one seek bar for all, sound from one of them.

   Runs as js_on_load of a gr.HTML, where `element` is its outermost element and `watch` tells of a new value; Gradio
   then changes the elements in place, so whatever was set here has to be set again (`refresh`). The clip that is heard
   leads, since correcting it would be audible; the others are kept within half a frame of it, mostly a quarter. */

const players = new WeakMap();
const JUMP_SECONDS = 0.25; // farther apart than this, a clip jumps; nearer, it plays faster or slower for a moment
const GAIN = 6; // a second: a clip that is 50 ms behind plays 1.3 times as fast
const MOST = 0.5;

class Player {
  constructor(root) {
    this.root = root;
    this.playing = false;
    this.frame = 0;
    this.hovered = null;
  }

  get rate() {
    return Number(this.root.dataset.rate);
  }

  get last() {
    return Number(this.root.dataset.frames) - 1;
  }

  get clips() {
    return [...this.root.querySelectorAll('video:not([hidden])')];
  }

  get leader() {
    const clips = this.clips;
    return clips.find((clip) => !clip.muted) ?? clips[0];
  }

  at(seconds) {
    return Math.min(this.last, Math.max(0, Math.floor(seconds * this.rate + 0.01)));
  }

  seek(frame) {
    this.frame = Math.min(this.last, Math.max(0, frame));
    // The middle of a frame, so that rounding cannot show its neighbour.
    for (const clip of this.clips) clip.currentTime = (this.frame + 0.5) / this.rate;
    this.draw();
  }

  step(by) {
    this.pause();
    this.seek(this.frame + by);
  }

  async play() {
    if (this.playing || !this.leader) return;
    this.playing = true;
    if (this.frame === this.last) this.seek(0);
    this.draw();
    try {
      await Promise.all(this.clips.map((clip) => clip.play()));
    } catch (error) {
      if (error.name !== 'AbortError') console.warn(error); // aborted: paused again before it began
      this.pause();
      return;
    }
    this.watchFrames();
    this.tick();
  }

  pause() {
    if (!this.playing) return;
    this.playing = false;
    for (const clip of this.clips) {
      clip.pause();
      clip.playbackRate = 1;
    }
    this.seek(this.leader ? this.at(this.leader.currentTime) : 0);
  }

  toggle() {
    if (this.playing) this.pause();
    else this.play();
  }

  /* Which frame of the leader is on the screen, where the browser tells. */
  watchFrames() {
    this.leader?.requestVideoFrameCallback?.((_, { mediaTime }) => {
      if (!this.playing) return;
      this.frame = this.at(mediaTime);
      this.watchFrames();
    });
  }

  tick() {
    if (!this.playing) return;
    const leader = this.leader;
    if (!leader || !this.root.isConnected || !this.root.checkVisibility()) {
      this.pause();
      return;
    }
    leader.playbackRate = 1;
    for (const clip of this.clips) {
      if (clip !== leader && !leader.seeking && !clip.seeking) this.correct(clip, leader.currentTime - clip.currentTime);
    }
    if (!leader.requestVideoFrameCallback) this.frame = this.at(leader.currentTime);
    this.draw();
    requestAnimationFrame(() => this.tick());
  }

  correct(clip, behind) {
    if (Math.abs(behind) > JUMP_SECONDS) clip.currentTime += behind;
    const off = Math.abs(behind) > 0.25 / this.rate;
    const rate = off ? 1 + Math.max(-MOST, Math.min(MOST, GAIN * behind)) : 1;
    if (Math.abs(clip.playbackRate - rate) > 0.02 || rate === 1) clip.playbackRate = rate;
  }

  /* From the start again, all together. */
  loop() {
    for (const clip of this.clips) {
      clip.currentTime = 0;
      clip.play();
    }
  }

  hover(frame) {
    this.hovered = frame;
    this.draw();
  }

  chosen(kind) {
    return this.root.querySelector(`.tf-${kind} input:checked`)?.value;
  }

  refresh() {
    const [number, heard] = [this.chosen('clip') ?? this.root.dataset.clip, this.chosen('sound')];
    for (const part of this.root.querySelectorAll('video, svg[data-clip]')) {
      const away = part.dataset.clip !== number;
      if (away && part.tagName === 'VIDEO') part.pause();
      part.toggleAttribute('hidden', away);
    }
    for (const clip of this.root.querySelectorAll('video')) clip.muted = clip.dataset.column !== heard;
    if (this.root.checkVisibility()) for (const clip of this.clips) clip.preload = 'auto';
    else this.pause();
    this.draw();
  }

  draw() {
    const { root, frame, last, rate } = this;
    const told = this.hovered ?? frame;
    root.style.setProperty('--played', last ? frame / last : 0);
    root.style.setProperty('--hover', last ? told / last : 0);
    root.toggleAttribute('data-hovered', this.hovered !== null);
    const button = root.querySelector('.tf-play');
    if (!button) return; // no clip is finished yet
    button.setAttribute('aria-label', this.playing ? 'Pause' : 'Play');
    button.toggleAttribute('data-playing', this.playing);
    const seek = root.querySelector('.tf-seek');
    seek.value = frame;
    seek.setAttribute('aria-valuetext', `frame ${frame + 1} of ${last + 1}`);
    root.querySelector('.tf-time').textContent =
      `${(frame / rate).toFixed(2)} s · frame ${frame + 1} of ${last + 1}`;
    const label = root.querySelector('.tf-told');
    if (!label) return;
    label.textContent = `frame ${told + 1}`;
    for (const line of root.querySelectorAll('svg:not([hidden]) [data-values]')) {
      line.values ??= JSON.parse(line.dataset.values);
      const value = line.values[told];
      root.querySelector(`.tf-value[data-column="${line.dataset.column}"] b`).textContent =
        value === undefined ? '–' : value.toFixed(value < 0.01 ? 4 : 3);
    }
  }
}

const playerOf = (node) => {
  const root = node.closest?.('.tf-player');
  if (!root) return null;
  if (!players.has(root)) players.set(root, new Player(root));
  return players.get(root);
};

const refresh = () => element.querySelectorAll('.tf-player').forEach((root) => playerOf(root).refresh());

element.addEventListener('click', (event) => {
  if (event.target.closest('.tf-play, video')) playerOf(event.target)?.toggle();
});

element.addEventListener('input', (event) => {
  if (event.target.matches('.tf-seek')) playerOf(event.target).seek(Number(event.target.value));
});

element.addEventListener('change', (event) => {
  if (event.target.closest('.tf-clip')) {
    const player = playerOf(event.target);
    player.pause();
    player.refresh();
    player.seek(player.frame);
  } else if (event.target.matches('[type=radio]')) refresh();
});

/* The frame of the curve under a pointer. */
const frameAt = (event) => {
  const plot = event.target.closest('.tf-plot');
  if (!plot) return null;
  const box = plot.getBoundingClientRect();
  const { last } = playerOf(plot);
  return Math.min(last, Math.max(0, Math.round(((event.clientX - box.left) / box.width) * last)));
};

element.addEventListener('pointermove', (event) => {
  const [player, frame] = [playerOf(event.target), frameAt(event)];
  if (frame !== null && event.buttons === 1) player.seek(frame);
  player?.hover(frame);
});
element.addEventListener('pointerleave', () => {
  element.querySelectorAll('.tf-player').forEach((root) => playerOf(root).hover(null));
});
element.addEventListener('pointerdown', (event) => {
  const frame = frameAt(event);
  if (frame === null || event.button !== 0) return;
  event.target.closest('.tf-plot').setPointerCapture(event.pointerId); // so that it goes on beyond the curve's ends
  playerOf(event.target).seek(frame);
});

// Media events do not bubble.
element.addEventListener('ended', (event) => {
  const player = playerOf(event.target);
  if (player?.playing && event.target === player.leader) player.loop();
}, true);
element.addEventListener('pause', (event) => {
  const player = playerOf(event.target);
  if (player?.playing && event.target === player.leader && !event.target.ended) player.pause();
}, true);

// Space and arrows, wherever they do not mean something else.
document.addEventListener('keydown', (event) => {
  const inside = element.contains(event.target);
  if (!element.isConnected || event.ctrlKey || event.metaKey || event.altKey) return;
  if (!inside && event.target !== document.body) return;
  const visible = [...element.querySelectorAll('.tf-player')].find((root) => root.checkVisibility());
  const player = playerOf(event.target) ?? (visible && playerOf(visible));
  if (!player || event.target.matches('[type=radio], a, summary')) return;
  const by = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
  if (event.key === ' ' && !event.target.matches('button')) player.toggle();
  else if (by && !event.target.matches('.tf-split')) player.step(by);
  else return;
  event.preventDefault();
});

watch('value', refresh);
// Another view or tab was chosen, so that clips came into sight or went out of it.
new ResizeObserver(refresh).observe(element);
