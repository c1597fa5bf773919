'use strict';

const $ = id => document.getElementById(id);

// ---- small helpers

function element(tag, properties = {}, ...children) {
  const made = Object.assign(document.createElement(tag), properties);
  made.append(...children);
  return made;
}

function uid() { // crypto.randomUUID is missing from pages over plain HTTP
  return [...crypto.getRandomValues(new Uint8Array(12))].map(byte => byte.toString(16).padStart(2, '0')).join('');
}

const randomSeed = () => crypto.getRandomValues(new Uint32Array(1))[0] % 1e6;
const isLive = draft => LIVE.includes(draft.state);
const isBusy = draft => isLive(draft) || rewrites.has(draft.id);
const hasText = draft => Object.values(draft.fields).some(text => text.trim());
const isWhole = draft => Object.keys(FIELDS).every(name => draft.fields[name].trim());
const requestOf = draft => state.batches[draft.batch].request;
const plural = (count, noun) => `${count} ${noun}${count === 1 ? '' : 's'}`;
const setText = (node, text) => { if (node.textContent !== text) node.textContent = text; };

function debounced(wait, action) {
  let timer;
  return (...given) => { clearTimeout(timer); timer = setTimeout(() => action(...given), wait); };
}

function announce(text) {
  const line = element('p', {textContent: text});
  $('announcer').append(line);
  setTimeout(() => line.remove(), 20000);
}

let undoAction, toastTimer;
function toast(text, undo) {
  undoAction = undo;
  $('toast-text').textContent = text;
  $('undo').hidden = !undo;
  $('toast').classList.add('shown');
  clearTimeout(toastTimer);
  toastTimer = setTimeout(hideToast, undo ? 10000 : 5000);
}
/** It stays while somebody is at it; Ctrl+Z is Undo too wherever no text is edited, which has an Undo of its own. */
function listenToToast() {
  const stay = () => clearTimeout(toastTimer), go = () => { stay(); toastTimer = setTimeout(hideToast, 5000); };
  for (const [name, action] of [['pointerenter', stay], ['focusin', stay], ['pointerleave', go], ['focusout', go]]) $('toast').addEventListener(name, action);
  const takeBack = () => { undoAction?.(); hideToast(); };
  $('undo').onclick = takeBack;
  addEventListener('keydown', event => {
    const isUndo = event.key.toLowerCase() === 'z' && (event.ctrlKey || event.metaKey) && !event.shiftKey;
    if (!isUndo || event.target.matches('input:not([type=radio], [type=checkbox]), textarea') || $('undo').hidden || !$('toast').classList.contains('shown')) return;
    event.preventDefault();
    takeBack();
  });
}
function hideToast() {
  if ($('toast').contains(document.activeElement)) $('drafts-title').focus();
  $('toast').classList.remove('shown');
  $('toast-text').textContent = '';
}
