/* Whatever the queue tells comes over one request, which ends with the last word of the last run. Gradio's client (6.31)
   aborts that request as soon as it has read the last word, and takes the abort for a lost connection where the browser
   tells of it sooner than of the end: a run that ended well has then failed, and Generate, pressed, makes nothing.

   So that request cannot be aborted. The server ends it, and of what it was told to abort the client reads no more. */

const QUEUE = '/queue/data';
const send = window.fetch;

window.fetch = (asked, how) => {
  const queue = asked instanceof Request && new URL(asked.url).pathname.endsWith(QUEUE);
  return send(queue ? new Request(asked, { signal: null }) : asked, how);
};
