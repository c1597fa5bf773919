'use strict';

// ---- two drafts of a course side by side

const MOST_CELLS = 4e6; // of a comparison; longer texts are shown without marks
const segmenter = 'Segmenter' in Intl ? new Intl.Segmenter(undefined, {granularity: 'word'}) : null;
const wordsIn = text => segmenter ? [...segmenter.segment(text)].map(({segment}) => segment) : text.match(/\s+|[^\s]+/g) ?? [];

/** For each word of either text, whether the other has it too in the same order (longest common subsequence). */
function shared(ours, theirs) {
  const width = theirs.length + 1, both = [new Array(ours.length).fill(false), new Array(theirs.length).fill(false)];
  if ((ours.length + 1) * width > MOST_CELLS) return both.map(list => list.fill(true));
  const longest = new Uint16Array((ours.length + 1) * width);
  for (let i = ours.length - 1; i >= 0; i--) {
    for (let j = theirs.length - 1; j >= 0; j--) {
      longest[i * width + j] = ours[i] === theirs[j] ? longest[(i + 1) * width + j + 1] + 1 : Math.max(longest[(i + 1) * width + j], longest[i * width + j + 1]);
    }
  }
  for (let i = 0, j = 0; i < ours.length && j < theirs.length;) {
    if (ours[i] === theirs[j]) both[0][i++] = both[1][j++] = true;
    else if (longest[(i + 1) * width + j] >= longest[i * width + j + 1]) i++;
    else j++;
  }
  return both;
}

/** The text with what the other draft lacks in <mark>. */
function markedText(words, isShared) {
  const pieces = [];
  for (let at = 0; at < words.length;) {
    let end = at;
    while (end < words.length && isShared[end] === isShared[at]) end++;
    const text = words.slice(at, end).join('');
    pieces.push(isShared[at] || !text.trim() ? text : element('mark', {textContent: text}));
    at = end;
  }
  return pieces;
}

function openCompare(group, drafts) {
  const isOpen = !group.compare.hidden;
  group.pair = isOpen ? null : drafts.filter(isComparable).slice(0, 2).map(draft => draft.id);
  draw();
  if (!isOpen) group.compare.querySelector('select').focus();
}

const isComparable = draft => !isLive(draft) && hasText(draft);
const nameOf = draft => [`Draft ${draft.number}`, emphasisOf(draft).name].filter(Boolean).join(', ');
const emphasisOf = draft => EMPHASES[draft.emphasis] ?? {name: ''};

function drawCompare(group, drafts) {
  const able = drafts.filter(isComparable);
  const pair = group.pair?.map(id => able.find(draft => draft.id === id));
  const isOpen = Boolean(pair?.every(Boolean));
  if (group.pair && !isOpen) group.pair = null;
  group.act.compare.hidden = drafts.length < 2;
  group.act.compare.disabled = able.length < 2;
  group.act.compare.setAttribute('aria-expanded', String(isOpen));
  setText(group.act.compare, isOpen ? 'Close the comparison' : 'Compare two');
  group.compare.hidden = !isOpen;
  if (!isOpen) return;
  group.rows ??= makeCompare(group);
  const key = JSON.stringify([pair.map(draft => [draft.id, draft.fields, isBusy(draft)]), able.map(draft => draft.id)]);
  if (group.compared === key) return;
  group.compared = key;
  group.picks.forEach((pick, side) => {
    const ids = able.map(draft => draft.id).join();
    if (pick.dataset.ids !== ids) {
      pick.replaceChildren(...able.map(draft => element('option', {value: draft.id, textContent: nameOf(draft)})));
      pick.dataset.ids = ids;
    }
    pick.value = group.pair[side];
  });
  for (const [name, sides] of Object.entries(group.rows)) {
    const words = pair.map(draft => wordsIn(draft.fields[name])), marks = shared(...words);
    sides.forEach(({text, use, who}, side) => {
      setText(who, nameOf(pair[side]));
      text.lang = languageOf(pair[side]);
      text.replaceChildren(...markedText(words[side], marks[side]));
      const other = pair[1 - side];
      setText(use, `Use this ${FIELDS[name].label.toLowerCase()} in draft ${other.number}`);
      use.disabled = pair[0] === pair[1] || isBusy(other) || !pair[side].fields[name].trim() || pair[side].fields[name] === other.fields[name];
    });
  }
}

function makeCompare(group) {
  const draftOn = side => state.drafts.find(draft => draft.id === group.pair[side]);
  const picks = ['Left', 'Right'].map((label, side) => element('select', {ariaLabel: `${label} draft`, onchange: event => { group.pair[side] = event.target.value; draw(); }}));
  const rows = {};
  const parts = [
    element('p', {className: 'hint', textContent: 'Underlined: what the other draft does not have.'}),
    element('div', {className: 'beside'}, ...picks),
  ];
  for (const [name, {label}] of Object.entries(FIELDS)) {
    rows[name] = [0, 1].map(side => {
      const use = element('button', {type: 'button', onclick: () => usePart(draftOn(side), draftOn(1 - side), name)});
      const text = element('p', {className: `words ${name}`, dir: 'auto'});
      const who = element('p', {className: 'who'});
      return {text, use, who, root: element('div', {}, who, text, use)};
    });
    parts.push(element('h4', {textContent: label}), element('div', {className: 'beside'}, ...rows[name].map(({root}) => root)));
  }
  group.picks = picks;
  group.compare.append(...parts);
  return rows;
}

/** Put a text of one draft into another, with what the service has found in it. */
function usePart(from, to, name) {
  const {label, key} = FIELDS[name], of = (draft, kind, isOfPart) => (draft.review?.[kind] ?? []).filter(one => (one.field === key) === isOfPart);
  changeBack(to, `The ${label.toLowerCase()} of draft ${from.number} stands in draft ${to.number}.`, ['fields', 'review', 'accepted', 'bare']);
  to.fields[name] = from.fields[name];
  to.bare = false;
  if (from.review || to.review) {
    to.review = {...to.review, ...Object.fromEntries(['sentences', 'notes'].map(kind => [kind, [...of(to, kind, false), ...of(from, kind, true)]]))};
  }
  to.accepted = [...new Set([...to.accepted ?? [], ...from.accepted ?? []])];
  announce(`The ${label.toLowerCase()} of draft ${from.number} stands in draft ${to.number}.`);
  save(to);
  draw();
}
