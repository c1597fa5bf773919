'use strict';

// ---- the page from the state

let drawing;
function render() {
  drawing ??= requestAnimationFrame(draw);
}

function draw() {
  cancelAnimationFrame(drawing);
  drawing = undefined;
  const shown = new Set(state.drafts.map(draft => draft.id)), busy = state.drafts.filter(isBusy).length;
  for (const [id, card] of cards) if (!shown.has(id)) { card.root.remove(); cards.delete(id); }
  const courses = grouped(state.drafts);
  for (const [batch, group] of groups) if (!courses.has(batch)) { group.root.remove(); groups.delete(batch); }
  [...courses].forEach(([batch, drafts], index) => {
    const group = groups.get(batch) ?? makeGroup(batch);
    placeAt($('cards'), index, group.root);
    drawGroup(group, batch, drafts);
  });
  $('empty').hidden = state.drafts.length > 0 || !state.loaded;
  $('clear').hidden = !state.drafts.length;
  $('edit-hint').hidden = !state.drafts.some(draft => draft.state === 'done');
  $('stop-all').hidden = !busy;
  $('change-key').hidden = !storedKey();
  $('storage-note').hidden = !state.unkept;
  setText($('storage-note'), state.unkept);
  const lines = state.error.map(line => element('p', {textContent: line}));
  if ($('form-error').textContent !== state.error.join('')) $('form-error').replaceChildren(...lines);
  document.title = busy ? `${plural(busy, 'draft')} being written` : 'Badge drafts';
}

function grouped(drafts) {
  const courses = new Map();
  for (const draft of drafts) courses.set(draft.batch, [...courses.get(draft.batch) ?? [], draft]);
  return courses;
}

function placeAt(parent, index, node) {
  if (parent.children[index] !== node) parent.insertBefore(node, parent.children[index] ?? null);
}

// ---- the drafts of a course stand in one group

const groups = new Map(); // batch id: its elements
const folded = new Set(); // batch ids
const MANY = 8; // drafts that stand open when a course is written or the page is opened; older courses are folded to a line

function foldOld() {
  const courses = [...grouped(state.drafts)];
  let count = 0;
  courses.forEach(([batch, drafts], index) => {
    count += drafts.length;
    if (index && count > MANY && !drafts.some(isLive)) folded.add(batch);
  });
}

function makeGroup(batch) {
  const root = $('group').content.cloneNode(true).firstElementChild, find = selector => root.querySelector(selector);
  const group = {root, title: find('.fold'), time: find('time'), told: find('.told'), compare: find('.versus'), cards: find('.cards'), act: {}, pair: null};
  const {created, title, request} = state.batches[batch];
  const drafts = () => state.drafts.filter(draft => draft.batch === batch);
  group.title.textContent = title ?? courseTitle(request.content);
  group.title.id = `course-${batch}`;
  group.title.dir = 'auto';
  group.title.onclick = () => { folded.delete(batch) || folded.add(batch); draw(); };
  root.setAttribute('aria-labelledby', group.title.id);
  group.time.dateTime = new Date(created).toISOString();
  group.time.textContent = new Intl.DateTimeFormat('en', {dateStyle: 'medium', timeStyle: 'short'}).format(created);
  const actions = {
    compare: () => openCompare(group, drafts()),
    clear: () => removeDrafts(drafts(), 'The drafts of this course are removed.'),
  };
  for (const button of root.querySelectorAll('[data-do]')) {
    group.act[button.dataset.do] = button;
    button.onclick = actions[button.dataset.do];
  }
  group.act.clear.append(element('span', {className: 'unseen', textContent: ` the drafts of ${group.title.textContent}`}));
  groups.set(batch, group);
  return group;
}

function drawGroup(group, batch, drafts) {
  const isFolded = folded.has(batch), favourite = drafts.find(draft => draft.favourite);
  group.title.setAttribute('aria-expanded', String(!isFolded));
  group.root.classList.toggle('folded', isFolded);
  const best = favourite?.fields.name ? `, favourite: ${favourite.fields.name}` : '';
  setText(group.told, ` · ${plural(drafts.length, 'draft')}${best}`);
  group.cards.hidden = isFolded;
  group.act.clear.hidden = isFolded;
  if (isFolded) group.pair = null;
  drawCompare(group, drafts);
  if (isFolded) {
    group.act.compare.hidden = true;
    return;
  }
  drafts.forEach((draft, index) => {
    const card = cards.get(draft.id) ?? makeCard(draft);
    placeAt(group.cards, index, card.root);
    drawCard(draft, card);
  });
}

function makeCard(draft) {
  const root = $('card').content.cloneNode(true).firstElementChild;
  const find = selector => root.querySelector(selector);
  const card = {
    root, title: find('h4'), state: find('.state'), figures: find('.figures'), art: find('.art'), error: find('.alert'), notes: find('.notes'),
    act: {}, fields: {}, drawn: null,
  };
  card.title.id = `title-${draft.id}`;
  card.title.append(element('span', {className: 'unseen', textContent: 'Draft '}), String(draft.number));
  setText(find('.emphasis'), emphasisOf(draft).name);
  root.setAttribute('aria-labelledby', card.title.id);
  const of = text => element('span', {className: 'unseen', textContent: ` ${text}draft ${draft.number}`});
  for (const [name, {label}] of Object.entries(FIELDS)) {
    const id = `${name}-${draft.id}`;
    const input = element('textarea', {id, rows: 1, dir: 'auto', oninput: () => edit(draft, name, input.value)});
    if (name === 'name') input.onkeydown = event => { if (event.key === 'Enter') event.preventDefault(); };
    const anew = element('button', {type: 'button', className: 'quiet', textContent: 'Rewrite', onclick: () => rewrite(draft, name)}, of(`the ${label.toLowerCase()} of `));
    const head = element('div', {className: 'row spread'}, element('label', {htmlFor: id, textContent: label}, of('of ')), anew);
    const read = element('div', {className: 'read', dir: 'auto', onclick: event => editAt(event, card.fields[name])});
    const stack = element('div', {className: 'stack'}, read, input);
    const aside = element('div', {className: 'aside'});
    const field = element('div', {className: `field ${name}`}, head, stack, aside);
    (name === 'name' ? find('.head') : find('.body')).append(field);
    card.fields[name] = {field, input, anew, read, stack, aside};
  }
  card.skills = makeSkills(draft);
  find('.body').append(card.skills.root);
  const actions = {
    export: () => openExport(draft), again: () => again(draft), stop: () => stop(draft), favourite: () => favour(draft),
    copy: () => copy(Object.keys(FIELDS).map(name => draft.fields[name]).filter(Boolean).join('\n\n')),
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

/** One draft of a course is the favourite at most. */
function favour(draft) {
  const isFavourite = !draft.favourite;
  for (const other of state.drafts.filter(other => other.batch === draft.batch)) {
    other.favourite = other === draft && isFavourite;
    save(other);
  }
  render();
}

function drawCard(draft, card) {
  const live = isLive(draft), rewriting = rewrites.get(draft.id)?.field;
  card.root.classList.toggle('busy', live || Boolean(rewriting));
  // A batch settles to the height of its texts when it is whole and nobody types in it: nothing moves under a reader.
  const batchLive = state.drafts.some(other => other.batch === draft.batch && isLive(other));
  const typing = card.root.classList.contains('live') && document.activeElement?.matches('.field textarea');
  card.root.classList.toggle('live', batchLive || typing);
  card.root.classList.toggle('bare', draft.bare);
  // A draft that waits is a line or two; it takes its room when its turn comes.
  card.root.classList.toggle('waiting', live && draft.state === 'queued' && draft.position > 0 && Date.now() - draft.queuedAt > 400);
  card.act.favourite.setAttribute('aria-pressed', String(Boolean(draft.favourite)));
  const [tone, words] = statusOf(draft, rewriting);
  card.state.className = `state dot ${tone}`;
  setText(card.state, words);
  setText(card.figures, figuresOf(draft));
  drawArt(draft, card);
  drawSkills(draft, card.skills);
  const current = rewriting ?? (live ? Object.keys(FIELDS).findLast(name => draft.fields[name]) : undefined);
  const lang = languageOf(draft) || (requestOf(draft).language ?? '');
  for (const [name, {field, input, anew, read}] of Object.entries(card.fields)) {
    const writing = live || rewriting === name;
    if (field.classList.contains('writing') && name !== current) input.scrollTop = 0; // written: now it is read
    field.classList.toggle('writing', name === current);
    input.readOnly = writing;
    if (input.lang !== lang) input.lang = read.lang = lang; // for the spell-check, and for whoever has it read aloud
    if (input.value !== draft.fields[name]) {
      const follows = input.scrollTop + input.clientHeight > input.scrollHeight - 30;
      input.value = draft.fields[name];
      if (writing && follows) input.scrollTop = input.scrollHeight;
    }
    if (!writing) fitHeight(input);
    drawReview(draft, card, name, !live && rewriting !== name);
    anew.disabled = live || Boolean(rewriting);
    field.setAttribute('aria-busy', String(writing));
  }
  drawActions(draft, card, live || Boolean(rewriting));
  drawNotes(draft, card, !live);
  const after = draft.error?.retryAfter ? ` The service asks to wait ${plural(draft.error.retryAfter, 'second')}.` : '';
  const cut = draft.state === 'done' && draft.finish === 'length' ? 'The longest length was reached: the end may be missing. Raise it in the form, or complete the text here.' : '';
  const dead = live && draft.lost && state.health.unreachable ? 'The service does not answer. What is written stays here, and the draft goes on by itself once the service is back.' : '';
  setText(card.error, dead || (draft.error ? draft.error.detail + after : cut));
}

function drawActions(draft, card, busy) {
  const {act} = card;
  const focused = document.activeElement;
  act.stop.hidden = !busy;
  act.stop.disabled = draft.stopping;
  act.again.hidden = act.copy.hidden = act.export.hidden = busy;
  act.export.disabled = !draft.fields.name.trim();
  act.copy.disabled = !hasText(draft);
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
  if (draft.lost) return state.health.unreachable ? ['bad', 'The service does not answer'] : ['warn', 'Connection lost, resuming'];
  return {
    sending: ['', 'Sending'], queued: ['', draft.position ? `Waiting, number ${draft.position} in the queue` : 'Waiting'],
    writing: ['', draft.tokens ? 'Writing' : 'Reading the course'], done: ['', 'Draft'], stopped: ['warn', 'Stopped'], failed: ['bad', 'Failed'],
  }[draft.state];
}

function rateOf(draft, now = Date.now()) {
  const seconds = (now - draft.firstToken) / 1000;
  return draft.firstToken && seconds > .2 ? (draft.tokens - 1) / seconds : 0;
}

/** Seconds in words, as coarse as they are known. */
function aboutSeconds(seconds) {
  if (seconds < 8) return 'a few seconds';
  return seconds < 60 ? `about ${Math.ceil(seconds / 5) * 5} s` : `about ${Math.ceil(seconds / 60)} min`;
}

function figuresOf(draft) {
  const now = draft.lost ? draft.lostSince : Date.now(); // no clock runs where nothing is written
  if (!isLive(draft)) {
    const {tokens, rate, seconds} = draft;
    return [seconds > 0 && `written in ${seconds.toFixed(seconds < 10 ? 1 : 0)} s`, tokens && plural(tokens, 'token'), rate > 0 && `${rate.toFixed(rate < 10 ? 1 : 0)} tokens/s`].filter(Boolean).join(' · ');
  }
  if (draft.state === 'queued' && draft.position) return draft.wait ? `begins in ${aboutSeconds(draft.wait - (now - draft.waitSince) / 1000)}` : '';
  if (!draft.started || draft.lost) return draft.lost && draft.tokens ? `stopped at ${plural(draft.tokens, 'token')}` : '';
  const left = secondsLeft(draft, now);
  return [left !== undefined && `${aboutSeconds(left)} left`, `${Math.floor((now - draft.started) / 1000)} s so far`].filter(Boolean).join(' · ');
}

function edit(draft, name, text) {
  draft.fields[name] = text.replaceAll('\n', name === 'name' ? ' ' : '\n');
  saveSoon();
  render();
}

function removeDrafts(drafts, text) {
  const back = drafts.filter(draft => !isBusy(draft) && hasText(draft));
  drafts.forEach(dropDraft);
  render();
  $('drafts-title').focus();
  toast(text, back.length ? () => restoreDrafts(back) : undefined);
}
