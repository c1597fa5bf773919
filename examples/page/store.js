'use strict';

// ---- what the browser keeps: one entry a record, so that two tabs do not undo each other's

const store = {
  read(name, storage = localStorage) {
    try { return JSON.parse(storage.getItem(`dccapi.${name}`)); } catch { return null; }
  },
  write(name, value, storage = localStorage) {
    try {
      if (value === null) storage.removeItem(`dccapi.${name}`);
      else storage.setItem(`dccapi.${name}`, JSON.stringify(value));
    } catch {
      toast('This browser keeps no more drafts: export the ones you need, or clear them.');
    }
  },
  names(prefix) {
    try { return Object.keys(localStorage).filter(key => key.startsWith(`dccapi.${prefix}`)).map(key => key.slice(7)); } catch { return []; }
  },
};

function save(draft) {
  if (!state.drafts.includes(draft)) return;
  store.write(`batch.${draft.batch}`, state.batches[draft.batch]);
  store.write(`draft.${draft.id}`, draft);
}
const saveSoon = debounced(300, save);

function loadDrafts() {
  for (const name of store.names('batch.')) state.batches[name.slice(6)] = store.read(name);
  const drafts = store.names('draft.').map(name => store.read(name)).filter(draft => draft && state.batches[draft.batch]);
  state.drafts = drafts.sort((a, b) => b.created - a.created || a.number - b.number);
  for (const draft of state.drafts.filter(isLive)) {
    Object.assign(draft, {lost: false, stopping: false});
    draft.generation ? follow(draft) : send(draft);
  }
}

function dropDraft(draft) {
  if (isBusy(draft)) stop(draft);
  state.drafts = state.drafts.filter(other => other !== draft);
  store.write(`draft.${draft.id}`, null);
  if (!state.drafts.some(other => other.batch === draft.batch)) store.write(`batch.${draft.batch}`, null);
}

function restoreDrafts(drafts) {
  state.drafts.push(...drafts);
  state.drafts.sort((a, b) => b.created - a.created || a.number - b.number);
  drafts.forEach(save);
  render();
}
