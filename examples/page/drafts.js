'use strict';

// ---- the page from the state

let drawing;
function render() {
  drawing ??= requestAnimationFrame(draw);
}

function draw() {
  drawing = undefined;
  const shown = new Set(state.drafts.map(draft => draft.id));
  for (const [id, card] of cards) if (!shown.has(id)) { card.root.remove(); cards.delete(id); }
  state.drafts.forEach((draft, index) => {
    const card = cards.get(draft.id) ?? makeCard(draft);
    if ($('cards').children[index] !== card.root) $('cards').insertBefore(card.root, $('cards').children[index] ?? null);
    drawCard(draft, card);
  });
  const busy = state.drafts.filter(isBusy).length;
  $('empty').hidden = state.drafts.length > 0;
  $('clear').hidden = !state.drafts.length;
  $('edit-hint').hidden = !state.drafts.some(draft => draft.state === 'done');
  $('stop-all').hidden = !busy;
  $('change-key').hidden = !storedKey();
  const lines = state.error.map(line => element('p', {textContent: line}));
  if ($('form-error').textContent !== state.error.join('')) $('form-error').replaceChildren(...lines);
  document.title = busy ? `${plural(busy, 'draft')} being written` : 'Badge drafts';
}

function makeCard(draft) {
  const root = $('card').content.cloneNode(true).firstElementChild;
  const find = selector => root.querySelector(selector);
  const card = {root, title: find('h3'), state: find('.state'), figures: find('.figures'), art: find('.art'), error: find('.alert'), act: {}, fields: {}, drawn: null};
  card.title.id = `title-${draft.id}`;
  root.setAttribute('aria-labelledby', card.title.id);
  const of = text => element('span', {className: 'unseen', textContent: ` ${text}draft ${draft.number}`});
  for (const [name, {label}] of Object.entries(FIELDS)) {
    const id = `${name}-${draft.id}`;
    const input = element('textarea', {id, rows: 1, oninput: () => edit(draft, name, input.value)});
    if (name === 'name') input.onkeydown = event => { if (event.key === 'Enter') event.preventDefault(); };
    const anew = element('button', {type: 'button', className: 'quiet', textContent: 'Rewrite', onclick: () => rewrite(draft, name)}, of(`the ${label.toLowerCase()} of `));
    const head = element('div', {className: 'row spread'}, element('label', {htmlFor: id, textContent: label}, of('of ')), anew);
    const field = element('div', {className: `field ${name}`}, head, input);
    (name === 'name' ? find('.head') : find('.body')).append(field);
    card.fields[name] = {field, input, anew};
  }
  const actions = {
    export: () => openExport(draft), again: () => again(draft), stop: () => stop(draft),
    copy: () => copy(Object.keys(FIELDS).map(name => draft.fields[name]).join('\n\n')),
    design: () => openDesign(draft),
    svg: () => download(new Blob([svgText(draft)], {type: 'image/svg+xml'}), fileName(draft, 'svg')),
    png: async () => download(await pngOf(draft), fileName(draft, 'png')),
    remove: () => removeDrafts([draft], `Draft ${draft.number} removed.`),
  };
  for (const button of root.querySelectorAll('[data-do]')) {
    const name = button.dataset.do;
    card.act[name] = button;
    button.onclick = actions[name];
    button.append(of({design: 'the image of ', svg: 'image of ', png: 'image of '}[name] ?? ''));
  }
  cards.set(draft.id, card);
  return card;
}

function drawCard(draft, card) {
  const live = isLive(draft), rewriting = rewrites.get(draft.id)?.field;
  card.root.classList.toggle('busy', live || Boolean(rewriting));
  // A batch settles to the height of its texts when it is whole and nobody types in it: nothing moves under a reader.
  const batchLive = state.drafts.some(other => other.batch === draft.batch && isLive(other));
  const typing = card.root.classList.contains('live') && document.activeElement?.matches('.field textarea');
  card.root.classList.toggle('live', batchLive || typing);
  card.root.classList.toggle('bare', draft.bare);
  setText(card.title, `Draft ${draft.number}`);
  const [tone, words] = statusOf(draft, rewriting);
  card.state.className = `state dot ${tone}`;
  setText(card.state, words);
  setText(card.figures, figuresOf(draft));
  drawArt(draft, card);
  const current = rewriting ?? (live ? Object.keys(FIELDS).findLast(name => draft.fields[name]) : undefined);
  for (const [name, {field, input, anew}] of Object.entries(card.fields)) {
    const writing = live || rewriting === name;
    if (field.classList.contains('writing') && name !== current) input.scrollTop = 0; // written: now it is read
    field.classList.toggle('writing', name === current);
    input.readOnly = writing;
    if (input.value !== draft.fields[name]) {
      const follows = input.scrollTop + input.clientHeight > input.scrollHeight - 30;
      input.value = draft.fields[name];
      if (writing && follows) input.scrollTop = input.scrollHeight;
    }
    if (!writing) fitHeight(input);
    anew.disabled = live || Boolean(rewriting) || !isWhole(draft);
    field.setAttribute('aria-busy', String(writing));
  }
  drawActions(draft, card, live || Boolean(rewriting));
  const after = draft.error?.retryAfter ? ` The service asks to wait ${plural(draft.error.retryAfter, 'second')}.` : '';
  const cut = draft.state === 'done' && draft.finish === 'length' ? 'The token limit was reached: the end may be missing. Raise it under Advanced, or complete the text here.' : '';
  setText(card.error, draft.error ? draft.error.detail + after : cut);
}

function drawActions(draft, card, busy) {
  const {act} = card;
  const focused = document.activeElement;
  act.stop.hidden = !busy;
  act.stop.disabled = draft.stopping;
  act.again.hidden = act.copy.hidden = act.export.hidden = busy;
  act.export.disabled = act.copy.disabled = !isWhole(draft);
  act.design.disabled = act.svg.disabled = act.png.disabled = isLive(draft) || !draft.fields.name.trim();
  if (focused === act.stop && act.stop.hidden) (act.export.disabled ? act.again : act.export).focus();
}

function drawArt(draft, card) {
  // Drawn once the name stands: it would be redrawn with every token of it otherwise.
  const ready = draft.fields.name.trim() && (!isLive(draft) || draft.fields.description) && rewrites.get(draft.id)?.field !== 'name';
  const art = artOf(draft), key = ready ? artKey(art) : 'ghost';
  if (card.drawn === key || (card.drawn && !ready && rewrites.has(draft.id))) return;
  const drawn = ready ? drawBadge(art) : drawGhost(art);
  if (card.drawn === 'ghost') drawn.classList.add('struck');
  card.drawn = key;
  card.art.replaceChildren(drawn);
}

const growsItself = CSS.supports('field-sizing', 'content');
function fitHeight(input) {
  if (growsItself) return;
  input.style.height = '';
  if (!input.closest('.live')) input.style.height = `${input.scrollHeight + 2}px`;
}

function statusOf(draft, rewriting) {
  if (rewriting) return ['', `Rewriting the ${FIELDS[rewriting].label.toLowerCase()}`];
  if (draft.stopping) return ['', 'Stopping'];
  if (draft.lost) return ['warn', 'Connection lost, resuming'];
  return {
    sending: ['', 'Sending'], queued: ['', draft.position ? `Waiting, number ${draft.position} in the queue` : 'Waiting'],
    writing: ['', draft.tokens ? 'Writing' : 'Reading the course'], done: ['good', 'Finished'], stopped: ['warn', 'Stopped'], failed: ['bad', 'Failed'],
  }[draft.state];
}

function rateOf(draft) {
  const seconds = (Date.now() - draft.firstToken) / 1000;
  return draft.firstToken && seconds > .2 ? (draft.tokens - 1) / seconds : 0;
}

function figuresOf(draft) {
  const live = isLive(draft);
  if (draft.state === 'queued' && draft.position) return draft.wait ? `about ${Math.ceil(draft.wait)} s` : '';
  const rate = live ? rateOf(draft) : draft.rate;
  const seconds = live ? (draft.started ? (Date.now() - draft.started) / 1000 : 0) : draft.seconds;
  return [
    draft.tokens && plural(draft.tokens, 'token'), rate > 0 && `${rate.toFixed(rate < 10 ? 1 : 0)} tokens/s`, seconds > 0 && `${seconds.toFixed(1)} s`,
  ].filter(Boolean).join(' · ');
}

function edit(draft, name, text) {
  draft.fields[name] = text.replaceAll('\n', name === 'name' ? ' ' : '\n');
  saveSoon(draft);
  render();
}

function removeDrafts(drafts, text) {
  const kept = drafts.filter(draft => !isBusy(draft) && isWhole(draft));
  drafts.forEach(dropDraft);
  render();
  $('drafts-title').focus();
  toast(text, kept.length ? () => restoreDrafts(kept) : undefined);
}
