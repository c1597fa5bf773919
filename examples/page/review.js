'use strict';

// ---- what the service has found in a draft: sentences that the course does not bear, and notes

const LOW_SUPPORT = .34; // of the words that carry meaning; below, the service notes a sentence too
const MARKING = ['unsupported_number', 'unsupported_name', 'low_support', 'repeated', 'title_not_from_course'];

const isShown = (draft, {field, text = ''}) => {
  const name = Object.keys(FIELDS).find(name => FIELDS[name].key === field);
  return !name || !text || draft.fields[name].includes(text.trim());
};

/** The notes that still hold: not those of a text that has been changed or that somebody has called right. */
function notesOf(draft) {
  const accepted = draft.accepted ?? [];
  return (draft.review?.notes ?? []).filter(note => isShown(draft, note) && !accepted.some(text => MARKING.includes(note.code) && note.text && text.includes(note.text)));
}

/** The places of a text to look at, in their order: [{start, end, text, word, reasons, source}]. */
function findingsOf(draft, name) {
  const {key} = FIELDS[name], text = draft.fields[name], found = [];
  const notes = notesOf(draft).filter(note => note.field === key && MARKING.includes(note.code) && note.text);
  const said = (draft.review?.sentences ?? []).filter(sentence => sentence.field === key);
  const parts = said.length ? said : notes.map(note => ({text: note.text, support: null, source: ''}));
  let from = 0;
  for (const {text: raw, support, source} of parts) {
    const sentence = raw.trim(), start = text.indexOf(sentence, from);
    if (start < 0 || !sentence || draft.accepted?.includes(sentence)) continue;
    from = start + sentence.length;
    const about = notes.filter(note => sentence.includes(note.text.trim()));
    const isLow = support !== null && support < LOW_SUPPORT;
    if (!isLow && !about.length) continue;
    const reasons = about.filter(note => note.code !== 'low_support').map(note => note.text.trim() === sentence ? note.message : `“${note.text}”: ${note.message}`);
    if (!reasons.length) reasons.push('The course has few words of this sentence; check that it says so.');
    found.push({start, end: from, text: sentence, word: isLow ? 'not in the course' : 'check this', reasons, source});
  }
  return found;
}

/** Under a text without findings stands nothing; over one with some lies the same text with them marked, until it is edited. */
function drawReview(draft, card, name, isStill) {
  const part = card.fields[name], findings = isStill ? findingsOf(draft, name) : [];
  const key = findings.length ? JSON.stringify([draft.fields[name], findings]) : '';
  if (part.marked === key) return;
  part.marked = key;
  part.stack.classList.toggle('marked', findings.length > 0);
  const text = draft.fields[name], pieces = [];
  const plain = (start, end, tag = 'span') => {
    const piece = element(tag, {textContent: text.slice(start, end), ariaHidden: 'true'});
    piece.dataset.from = start;
    return piece;
  };
  let from = 0;
  for (const finding of findings) {
    pieces.push(plain(from, finding.start), plain(finding.start, finding.end, 'u'));
    const label = element('span', {className: 'unseen', textContent: `: ${finding.text}`});
    const tag = element('button', {type: 'button', className: 'tag', onclick: () => openSource(draft, part, finding, tag)}, finding.word, label);
    tag.setAttribute('aria-expanded', 'false');
    pieces.push(' ', tag);
    from = finding.end;
  }
  pieces.push(plain(from, text.length));
  part.read.replaceChildren(...findings.length ? pieces : []);
  part.aside.replaceChildren();
  part.open = '';
}

/** The sentence of the draft beside that of the course. */
function openSource(draft, part, finding, tag) {
  const isOpen = part.open === finding.text;
  for (const other of part.read.querySelectorAll('.tag')) other.setAttribute('aria-expanded', String(other === tag && !isOpen));
  part.open = isOpen ? '' : finding.text;
  if (isOpen) return part.aside.replaceChildren();
  const quote = (label, text) => element('div', {}, element('p', {className: 'label', textContent: label}), element('p', {dir: 'auto', textContent: text}));
  const accept = element('button', {type: 'button', textContent: 'It is right', onclick: () => acceptSentence(draft, finding, part)});
  const drop = element('button', {type: 'button', textContent: 'Take the sentence out', onclick: () => dropSentence(draft, finding, part)});
  part.aside.replaceChildren(
    element('div', {className: 'beside'},
      quote('The draft', finding.text),
      quote('The nearest sentence of the course', finding.source || 'No sentence of the course has a word of it.')),
    ...finding.reasons.map(reason => element('p', {className: 'hint', textContent: reason})),
    element('div', {className: 'row'}, accept, drop),
  );
}

function changeBack(draft, text, names) {
  const before = structuredClone(Object.fromEntries(names.map(name => [name, draft[name]])));
  toast(text, () => {
    Object.assign(draft, before);
    save(draft);
    render();
  });
}

function acceptSentence(draft, finding, part) {
  changeBack(draft, 'Marked as right.', ['accepted']);
  draft.accepted = [...draft.accepted ?? [], finding.text];
  save(draft);
  draw();
  part.input.focus();
}

function dropSentence(draft, finding, part) {
  const name = Object.keys(FIELDS).find(name => part.input.id.startsWith(`${name}-`));
  changeBack(draft, 'The sentence is taken out.', ['fields']);
  const text = draft.fields[name], start = text.lastIndexOf('\n', finding.start) + 1;
  const isItem = /^[\s*-]*$/.test(text.slice(start, finding.start)) && /^\s*(\n|$)/.test(text.slice(finding.end));
  const before = text.slice(0, isItem ? start : finding.start), after = text.slice(finding.end).replace(isItem ? /^\s*?\n/ : /^ /, '');
  draft.fields[name] = (before + after).trim();
  save(draft);
  draw();
  part.input.focus();
}

/** A click into the marked text goes on in the text itself, at the same place. */
function editAt(event, part) {
  if (event.target.closest('button') || part.input.readOnly || !getSelection().isCollapsed) return;
  const caret = document.caretPositionFromPoint?.(event.clientX, event.clientY) ?? document.caretRangeFromPoint?.(event.clientX, event.clientY);
  const node = caret?.offsetNode ?? caret?.startContainer, offset = caret?.offset ?? caret?.startOffset;
  const piece = node?.parentElement?.closest('[data-from]');
  part.input.focus();
  if (piece) part.input.setSelectionRange(Number(piece.dataset.from) + offset, Number(piece.dataset.from) + offset);
}

function drawNotes(draft, card, isStill) {
  const notes = isStill ? notesOf(draft) : [];
  const key = JSON.stringify(notes);
  if (card.noted === key) return;
  card.noted = key;
  card.notes.hidden = !notes.length;
  card.notes.querySelector('summary').textContent = `${plural(notes.length, 'note')} on this draft`;
  card.notes.querySelector('ul').replaceChildren(...notes.map(({field, text = '', message}) => {
    const where = Object.values(FIELDS).find(({key}) => key === field)?.label ?? 'Course';
    const isShort = text && text.length <= 160 && !Object.values(draft.fields).includes(text);
    return element('li', {}, element('b', {textContent: where}), isShort ? ` “${text}” ` : ' ', message);
  }));
}
