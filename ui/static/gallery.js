/* Opens a recorded comparison of the gallery where it is, instead of by its address. */

element.addEventListener('click', (event) => {
  const tile = event.target.closest('[data-recorded]');
  if (!tile || event.ctrlKey || event.metaKey || event.shiftKey) return;
  event.preventDefault();
  trigger('select', { recorded: tile.dataset.recorded });
  scrollTo({ top: 0 });
});
