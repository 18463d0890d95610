/* One file to post: the pictures side by side, with names, numbers, verdict and link. A PNG; of clips an MP4, or a WebM
   where the browser writes no MP4, of one time through.

   Runs as js_on_load of the gr.HTML with the verdict, where `element` is its outermost element. What stands on it comes
   as data of the button (ui/html/cards.py); the pictures are those of the page. */

const SIDE = 480; // pixels a picture is wide
const GAP = 24;
const FONT = 'system-ui, -apple-system, "Segoe UI", Roboto, sans-serif';
const KINDS = [['video/mp4;codecs=avc1.42E01F', 'mp4'], ['video/webm;codecs=vp9', 'webm'], ['video/webm', 'webm']];

const lines = (context, text, width) => {
  const found = [''];
  for (const word of text.split(/\s+/)) {
    const longer = `${found.at(-1)} ${word}`.trim();
    if (context.measureText(longer).width <= width || !found.at(-1)) found[found.length - 1] = longer;
    else found.push(word);
  }
  return found;
};

/* A canvas with everything but the pictures, and where those go. */
const sheet = (told, sources) => {
  const canvas = document.createElement('canvas');
  const context = canvas.getContext('2d');
  const style = getComputedStyle(document.querySelector('.gradio-container'));
  const paper = style.getPropertyValue('--body-background-fill') || '#fff';
  const ink = style.getPropertyValue('--tf-ink') || '#111';
  const soft = style.getPropertyValue('--tf-soft') || '#666';
  const width = Math.max(2, sources.length) * (SIDE + GAP) + GAP;
  const [w, h] = [sources[0].naturalWidth || sources[0].videoWidth, sources[0].naturalHeight || sources[0].videoHeight];
  const tall = Math.round((SIDE * h) / w);
  const fonts = { title: `600 30px ${FONT}`, name: `600 22px ${FONT}`, small: `17px ${FONT}`, said: `20px ${FONT}` };
  const set = (font) => { context.font = fonts[font]; };
  set('title');
  const title = lines(context, `“${told.prompt}”`, width - 2 * GAP);
  set('said');
  const said = lines(context, told.verdict, width - 2 * GAP);
  set('small');
  const foot = lines(context, `${told.settings} · ${told.link}`, width - 2 * GAP);
  const top = GAP + title.length * 38;
  const height = top + 12 + tall + 74 + said.length * 28 + 12 + foot.length * 23 + GAP;
  Object.assign(canvas, { width, height: height + (height % 2) }); // video wants even sides
  const write = (font, colour, text, x, y) => {
    set(font);
    context.fillStyle = colour;
    context.fillText(text, x, y);
  };
  context.textBaseline = 'top';
  context.fillStyle = paper;
  context.fillRect(0, 0, canvas.width, canvas.height);
  title.forEach((line, i) => write('title', ink, line, GAP, GAP + i * 38));
  told.columns.forEach(({ name, numbers }, i) => {
    const x = GAP + i * (SIDE + GAP);
    write('name', ink, name, x, top + tall + 22);
    write('small', soft, numbers, x, top + tall + 50);
  });
  said.forEach((line, i) => write('said', ink, line, GAP, top + tall + 86 + i * 28));
  foot.forEach((line, i) => write('small', soft, line, GAP, top + tall + 98 + said.length * 28 + i * 23));
  const draw = () => sources.forEach((source, i) => {
    context.imageSmoothingQuality = 'high';
    context.drawImage(source, GAP + i * (SIDE + GAP), top + 12, SIDE, tall);
  });
  draw();
  return { canvas, draw };
};

const save = (blob, name) => {
  const link = Object.assign(document.createElement('a'), { href: URL.createObjectURL(blob), download: name });
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 60_000);
};

const asked = (source, name) => new Promise((resolve, reject) => {
  source.addEventListener(name, resolve, { once: true });
  source.addEventListener('error', () => reject(new TypeError('a clip cannot be loaded')), { once: true });
});

/* The clips once through, drawn frame by frame onto the sheet. */
const film = async (told, shown) => {
  const kind = KINDS.find(([type]) => globalThis.MediaRecorder?.isTypeSupported(type));
  if (!kind) throw new TypeError('this browser records no video');
  const clips = await Promise.all(shown.map(async (one) => {
    const clip = Object.assign(document.createElement('video'), { muted: true, playsInline: true, preload: 'auto' });
    const ready = asked(clip, 'canplaythrough');
    clip.src = one.currentSrc;
    await ready;
    return clip;
  }));
  const { canvas, draw } = sheet(told, clips);
  const recorder = new MediaRecorder(canvas.captureStream(30), { mimeType: kind[0], videoBitsPerSecond: 8_000_000 });
  const parts = [];
  recorder.addEventListener('dataavailable', ({ data }) => parts.push(data));
  const stopped = asked(recorder, 'stop');
  const ends = Promise.all(clips.map((clip) => asked(clip, 'ended')));
  let going = true;
  const each = () => {
    draw();
    if (going) requestAnimationFrame(each);
  };
  recorder.start();
  each();
  await Promise.all(clips.map((clip) => clip.play()));
  await ends;
  going = false;
  draw();
  recorder.stop();
  await stopped;
  return [new Blob(parts, { type: kind[0].split(';')[0] }), kind[1]];
};

const make = async (told) => {
  const shown = [...document.querySelectorAll('#tf-stage .tf-card')]
    .map((card) => card.querySelector('video:not([hidden]), img')).filter(Boolean);
  if (shown[0].tagName === 'VIDEO') return film(told, shown);
  await Promise.all(shown.map((one) => one.decode()));
  const { canvas } = sheet(told, shown);
  return [await new Promise((resolve) => { canvas.toBlob(resolve, 'image/png'); }), 'png'];
};

element.addEventListener('click', async (event) => {
  const button = event.target.closest('.tf-post');
  if (!button || button.disabled) return;
  const { post, making, failed } = button.dataset;
  const label = button.textContent;
  button.disabled = true;
  button.textContent = making;
  try {
    const told = JSON.parse(post);
    const page = location.origin + location.pathname;
    const [blob, ending] = await make({ ...told, link: `${page}${told.query}` });
    save(blob, `${told.file}.${ending}`);
    button.textContent = label;
  } catch (error) {
    console.warn(error);
    button.textContent = failed;
    setTimeout(() => { button.textContent = label; }, 3000);
  } finally {
    button.disabled = false;
  }
});
