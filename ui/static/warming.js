/* How far the preload is, while it runs.

   Runs as js_on_load of a gr.HTML. The server is asked past Gradio's queue, every two seconds while there is something
   to tell and somebody looks; afterwards only when the tab is looked at again, or when a run ends, which may have
   loaded what failed, or lost the device. */

const EVERY = 2000;
const box = element.querySelector('.tf-warming');
const said = box.querySelector('[role=status]');
const detail = box.querySelector('.tf-detail');
let timer = 0;
let closed = '';

const tell = (found) => {
  if (found.said !== said.textContent) said.textContent = found.said; // said aloud once
  detail.textContent = found.detail;
  box.toggleAttribute('data-still', !found.again);
  box.hidden = !found.said || found.said === closed;
  if (!found.said) closed = '';
};

const look = async () => {
  clearTimeout(timer);
  if (document.hidden || !element.isConnected) return;
  let again = false;
  try {
    const found = await (await fetch('warming')).json();
    tell(found);
    again = found.again;
  } catch (error) {
    if (!(error instanceof TypeError)) throw error;
    again = !box.hidden; // the server cannot be reached, which Gradio says by itself
  }
  clearTimeout(timer);
  if (again) timer = setTimeout(look, EVERY);
};

box.querySelector('button').addEventListener('click', () => {
  closed = said.textContent;
  box.hidden = true;
});
document.addEventListener('visibilitychange', look);
new MutationObserver((changes) => {
  const headlines = changes.map(({ target }) => target.closest('#tf-headline')).filter(Boolean);
  if (headlines.length && !headlines[0].querySelector('.tf-pulse')) look();
}).observe(document.querySelector('.gradio-container'), { childList: true, subtree: true });
look();
