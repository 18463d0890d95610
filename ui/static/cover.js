/* The first screen that the server drew (ui/html/cover.py) stands above Gradio's page while that is being built, and is
   taken away once the page shows the same: the same request, its pictures, in the same places. Gradio's own script
   begins when the pictures of the first screen are there, since on a slow machine it would keep them from being drawn.

   What was typed or pressed meanwhile is done then. An address that asks for a tab has no first screen, and one that
   asks for something else has it of that, or none (ui/handlers.py). */

const SEEN_MS = 1500; // pictures that take longer are not waited for
const ALIKE_MS = 2000; // once the page is there and shows something else, or elsewhere
const MOST_MS = 20000; // whatever Gradio says by then is to be read
const BUILT = ['#tf-go', '#tf-stop', '#tf-precisions label', '#tf-seed input', '#tf-views input', '#tf-more button'];

const after = (ms) => new Promise((resolve) => { setTimeout(resolve, ms); });
const drawn = () => (document.hidden ? after(0) : Promise.race([new Promise(requestAnimationFrame), after(200)]));
const visible = (parts) => [...parts].filter((part) => part.checkVisibility()
  && part.getBoundingClientRect().top < innerHeight);
const PLACED = ':is(#tf-stage, #tf-pairs) img, .tf-verdict, #tf-examples .gallery-item, #tf-precisions label, #tf-go';
const place = ({ left, top, width }) => [left, top, width];
const find = (selector) => document.querySelector(`gradio-app ${selector}`);

const dark = () => {
  const kept = localStorage.getItem('twinframe-theme');
  const asked = new URLSearchParams(location.search).get('__theme');
  const said = kept ?? (['dark', 'light'].includes(asked) ? asked : null);
  return said ? said === 'dark' : matchMedia('(prefers-color-scheme: dark)').matches;
};

class Cover extends HTMLElement {
  connectedCallback() {
    this.root = this.attachInternals().shadowRoot; // null where the browser knows no declarative ones
    this.pressed = [];
    this.touched = false;
    if (!this.root || !['', '#compare'].includes(location.hash)) {
      this.begin();
      this.remove();
      return;
    }
    const [screen, results] = [this.root.querySelector('style + div'), this.root.querySelector('#tf-results')];
    screen.classList.toggle('dark', dark());
    results.dataset.kind = 'pixels';
    if (matchMedia('(max-width: 640px)').matches) {
      results.dataset.view = 'slider';
      this.root.querySelector('input[name=tf-view][value=slider]').checked = true;
    }
    this.prompt = this.root.querySelector('textarea');
    this.root.addEventListener('click', (event) => this.press(event));
    this.prompt.addEventListener('keydown', (event) => {
      if (event.key !== 'Enter' || event.shiftKey) return;
      event.preventDefault();
      this.pressed.push('#tf-go');
    });
    document.addEventListener('input', ({ target }) => { this.touched ||= Boolean(target.closest?.('gradio-app')); });
    addEventListener('hashchange', () => this.remove());
    this.show();
  }

  begin() {
    const { entry } = this.dataset;
    if (entry) document.head.append(Object.assign(document.createElement('script'), { type: 'module', src: entry, crossOrigin: '' }));
  }

  press(event) {
    const { target } = event;
    const tab = target.closest('[role=tab]');
    if (tab) {
      event.preventDefault(); // the page's base would lose what the address asks for
      if (!tab.matches('.selected')) location.hash = tab.hash;
      return;
    }
    const { press } = target.closest('[data-press]')?.dataset ?? {};
    const view = target.closest('label')?.querySelector('input[name=tf-view]');
    if (press) this.pressed.push(press);
    else if (view) this.pressed.push(`input[name=tf-view][value=${view.value}]`);
  }

  async show() {
    this.images = visible(this.root.querySelectorAll('img'));
    await Promise.race([Promise.allSettled(this.images.map((image) => image.decode())), after(SEEN_MS)]);
    await drawn();
    performance.mark('twinframe-first-screen');
    await after(0); // drawn by now
    this.begin();
    const end = performance.now() + MOST_MS;
    while (this.isConnected && !this.built() && performance.now() < end) await after(30);
    const late = performance.now() + ALIKE_MS;
    while (this.isConnected && !this.alike() && performance.now() < late) await drawn();
    if (this.isConnected) this.give();
  }

  /* Whether the page is there, all of it, with what makes the address follow it (address.js). */
  built() {
    return BUILT.every(find) && Boolean(window.twinframe);
  }

  /* Whether it shows what is shown here, and in the same places. */
  alike() {
    if (!this.touched && find('#tf-prompt textarea')?.value !== this.dataset.prompt) return false;
    if (find('#tf-headline [data-asked]')?.dataset.address !== this.dataset.address) return false;
    const [mine, theirs] = [this.root, document.querySelector('gradio-app')].map((where) =>
      visible(where.querySelectorAll(PLACED)).filter((part) => part.complete !== false)
        .flatMap((part) => place(part.getBoundingClientRect())));
    return mine.length === theirs.length && mine.every((value, index) => Math.abs(value - theirs[index]) <= 2);
  }

  async give() {
    const pictures = visible(document.querySelectorAll('gradio-app :is(#tf-stage, #tf-pairs) img'));
    await Promise.race([Promise.allSettled(pictures.map((image) => image.decode())), after(SEEN_MS)]);
    const [prompt, { activeElement }] = [find('#tf-prompt textarea'), this.root];
    const { value, selectionStart, selectionEnd } = this.prompt;
    this.remove();
    if (prompt && value !== this.dataset.prompt && !this.touched) {
      prompt.value = value;
      prompt.dispatchEvent(new Event('input', { bubbles: true }));
    }
    if (prompt && activeElement === this.prompt) {
      prompt.focus({ preventScroll: true });
      prompt.setSelectionRange(selectionStart, selectionEnd);
    }
    for (const selector of this.pressed) {
      await after(100); // until Gradio knows what was typed or pressed before
      find(selector)?.click();
    }
  }
}
customElements.define('twinframe-cover', Cover);
