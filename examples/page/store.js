'use strict';

// ---- what the browser keeps: small things
// The form, the issuer and the key are an entry of localStorage each; drafts are records of a database, see below.

const store = {
  read(name, storage = localStorage) {
    try { return JSON.parse(storage.getItem(`dccapi.${name}`)); } catch { return null; }
  },
  write(name, value, storage = localStorage) {
    try {
      if (value === null) storage.removeItem(`dccapi.${name}`);
      else storage.setItem(`dccapi.${name}`, JSON.stringify(value));
      return true;
    } catch (fault) {
      tellUnkept(fault);
      return false;
    }
  },
  names(prefix) {
    try { return Object.keys(localStorage).filter(key => key.startsWith(`dccapi.${prefix}`)).map(key => key.slice(7)); } catch { return []; }
  },
};

function sessionOf() { // the tab, the same after a reload
  try { return sessionStorage['dccapi.tab'] ??= uid(); } catch { return uid(); }
}
const TAB = sessionOf();

// ---- drafts and their courses: a record each, with a version
// A tab writes only what it changed since it last read or wrote the record, and tells the other tabs what it wrote.
// So a tab that was left open with an old copy takes nothing away from a newer one.

const OF_THE_TAB = ['lost', 'lostSince', 'stopping', 'version']; // not part of what a tab changes
const PROGRESS = ['state', 'generation', 'run', 'owner', 'position', 'wait', 'waitSince', 'queuedAt', 'tokens', 'started', 'firstToken', 'fields', 'lost', 'lostSince'];
const SILENCE = 8000; // after so many milliseconds without a word another tab follows a draft in its place
const kept = new Map(); // draft id: the record as the database has it, as far as this tab knows
const removed = new Set(); // draft ids that were removed: a late word from another tab does not bring them back
const heard = new Map(); // draft id: when its tab was last heard of
const bus = 'BroadcastChannel' in window ? new BroadcastChannel('dccapi') : {postMessage() {}};

const asked = request => new Promise((resolve, reject) => {
  request.onsuccess = () => resolve(request.result);
  request.onerror = () => reject(request.error);
});

let database;
function openDatabase() {
  database ??= new Promise((resolve, reject) => {
    const opening = indexedDB.open('dccapi', 1);
    opening.onupgradeneeded = () => ['drafts', 'batches'].forEach(name => opening.result.createObjectStore(name, {keyPath: 'id'}));
    opening.onerror = () => reject(opening.error);
    opening.onsuccess = () => {
      opening.result.onversionchange = () => opening.result.close();
      opening.result.onclose = () => { database = undefined; };
      resolve(opening.result);
    };
  });
  database.catch(() => { database = undefined; });
  return database;
}

/** Do `work` with the drafts and the batches in one transaction; what it returns, once that is on disk. */
async function transact(mode, work) {
  const opened = await openDatabase();
  return new Promise((resolve, reject) => {
    const transaction = opened.transaction(['drafts', 'batches'], mode);
    const working = work(transaction.objectStore('drafts'), transaction.objectStore('batches'));
    transaction.oncomplete = () => resolve(working);
    transaction.onabort = () => reject(transaction.error ?? new DOMException('aborted', 'AbortError'));
    working.catch(fault => {
      reject(fault);
      try { transaction.abort(); } catch { /* it has ended already */ }
    });
  });
}

function tellUnkept(fault) {
  const full = fault?.name === 'QuotaExceededError';
  state.unkept = full
    ? 'This browser’s storage is full: the last changes are not kept. Export the drafts that you need, and remove some that you do not.'
    : 'This browser keeps no drafts of this page, perhaps because this is a private window. Export what you need before you close it.';
  render();
}

const same = (one, other) => JSON.stringify(one) === JSON.stringify(other);
const merge = (record, changes) => ({...record, ...changes, fields: {...record.fields, ...changes.fields}});
const byTime = (a, b) => b.created - a.created || (a.batch < b.batch ? -1 : a.batch > b.batch ? 1 : a.number - b.number);

function recordOf(draft) {
  const record = structuredClone(draft);
  OF_THE_TAB.forEach(name => delete record[name]);
  return record;
}

/** What differs from the record that was last read or written; texts one by one. */
function changesOf(draft, record = {fields: {}}) {
  const different = (ours, theirs) => Object.fromEntries(Object.entries(ours).filter(([name, value]) => !same(value, theirs[name])));
  const changes = different(recordOf(draft), record);
  if (changes.fields) changes.fields = different(draft.fields, record.fields);
  return changes;
}

const saving = new Map(); // draft id: the end of its last write
function save(draft) {
  const write = (saving.get(draft.id) ?? Promise.resolve()).then(() => writeRecord(draft));
  saving.set(draft.id, write);
  return write;
}

async function writeRecord(draft) {
  if (!state.drafts.includes(draft)) return;
  const before = kept.get(draft.id), changes = changesOf(draft, before), batch = state.batches[draft.batch];
  const written = recordOf(draft);
  if (!Object.keys(changes).length) return;
  try {
    const {record, stored} = await transact('readwrite', async (drafts, batches) => {
      const stored = await asked(drafts.get(draft.id));
      if (!stored && before) return {}; // another tab has removed it
      if (!before) batches.put({...batch, id: draft.batch});
      const record = {...merge(stored ?? {}, changes), version: (stored?.version ?? 0) + 1};
      drafts.put(record);
      return {record, stored};
    });
    if (!record) return takeAway(draft.id);
    if (removed.has(draft.id)) return;
    takeIn(record, written);
    bus.postMessage({type: 'draft', record, batch, isNew: !before});
    if (before && stored) tellClash(draft, before, stored, changes);
    if (state.unkept) {
      state.unkept = '';
      state.drafts.forEach(save);
      render();
    }
  } catch (fault) {
    tellUnkept(fault);
  }
}

let unsavedTimer;
function saveSoon() {
  clearTimeout(unsavedTimer);
  unsavedTimer = setTimeout(() => state.drafts.filter(draft => !isLive(draft)).forEach(save), 300);
}

/** Two tabs changed the same text before either heard of the other: the later one stands, the other can be had back. */
function tellClash(draft, before, stored, changes) {
  const clash = Object.keys(changes.fields ?? {}).filter(name => ![before.fields[name], changes.fields[name]].includes(stored.fields[name]));
  if (!clash.length || isLive(draft)) return;
  toast(`Draft ${draft.number} was changed in another tab at the same time. This tab’s text stands.`, () => {
    for (const name of clash) draft.fields[name] = stored.fields[name];
    save(draft);
    render();
  });
}

/** Show what another tab, or this one, has written; what was changed here since `base` stays as it is here. */
function takeIn(record, base = kept.get(record.id)) {
  const before = kept.get(record.id);
  if (removed.has(record.id) || record.version < before?.version) return;
  const draft = state.drafts.find(draft => draft.id === record.id);
  const mine = draft && base ? changesOf(draft, base) : {};
  kept.set(record.id, merge(before ?? {}, record));
  if (!draft) {
    state.drafts.push({...structuredClone(record), lost: false, stopping: false});
    state.drafts.sort(byTime);
  } else {
    const {fields = {}, ...rest} = record;
    for (const [name, value] of Object.entries(rest)) if (!(name in mine)) draft[name] = value;
    for (const [name, text] of Object.entries(fields)) if (!(name in (mine.fields ?? {}))) draft.fields[name] = text;
  }
  render();
}

/** A draft that was removed in another tab goes here too; with what was typed here it can be had back. */
function takeAway(id) {
  removed.add(id);
  const draft = state.drafts.find(draft => draft.id === id);
  if (!draft) return;
  const isChanged = !isLive(draft) && Boolean(changesOf(draft, kept.get(id)).fields);
  rewrites.get(id)?.controller.abort();
  unfollow(id);
  state.drafts = state.drafts.filter(other => other !== draft);
  kept.delete(id);
  if (isChanged) toast(`Draft ${draft.number} was removed in another tab while it was edited here.`, () => restoreDrafts([draft]));
  render();
}

function dropDraft(draft) {
  if (isBusy(draft)) stop(draft);
  state.drafts = state.drafts.filter(other => other !== draft);
  kept.delete(draft.id);
  removed.add(draft.id);
  deleteRecord(draft.id, draft.batch);
  bus.postMessage({type: 'gone', id: draft.id});
}

const deleting = new Map(); // draft id: its batch, until the record is gone
async function deleteRecord(id, batch) {
  deleting.set(id, batch);
  const isLast = !state.drafts.some(other => other.batch === batch);
  try {
    await transact('readwrite', async (drafts, batches) => {
      drafts.delete(id);
      if (isLast) batches.delete(batch);
    });
    deleting.delete(id);
  } catch (fault) {
    tellUnkept(fault);
  }
}

function restoreDrafts(drafts) {
  for (const draft of drafts) removed.delete(draft.id);
  state.drafts.push(...drafts);
  state.drafts.sort(byTime);
  drafts.forEach(save);
  render();
}

// ---- starting, and what other tabs say

async function loadDrafts() {
  try {
    await migrate();
    const [drafts, batches] = await transact('readonly', (drafts, batches) => Promise.all([asked(drafts.getAll()), asked(batches.getAll())]));
    for (const {id, ...batch} of batches) state.batches[id] ??= batch;
    drafts.filter(draft => state.batches[draft.batch]).forEach(takeIn);
  } catch (fault) {
    tellUnkept(fault);
  }
  state.loaded = true;
  takeUnsaved();
  foldOld();
  for (const draft of state.drafts.filter(isLive)) {
    if (draft.owner === TAB || !draft.owner) resume(draft);
    else heard.set(draft.id, Date.now() - SILENCE + 1500); // its tab may be open: it says so at once
  }
  bus.postMessage({type: 'who'});
  render();
}

/** Earlier versions of this page kept drafts in localStorage. They leave it once they are in the database. */
async function migrate() {
  const batches = store.names('batch.').map(name => [name.slice(6), store.read(name)]).filter(([, batch]) => batch?.request);
  const known = new Set(batches.map(([id]) => id));
  const drafts = store.names('draft.').map(name => store.read(name)).filter(draft => draft?.fields && known.has(draft.batch));
  if (drafts.length) {
    await transact('readwrite', async (records, courses) => {
      for (const draft of drafts) if (!await asked(records.get(draft.id))) records.put({...recordOf(draft), version: 1});
      for (const [id, batch] of batches) if (!await asked(courses.get(id))) courses.put({...batch, id});
    });
  }
  for (const {id} of drafts) store.write(`draft.${id}`, null);
  for (const [id] of batches) store.write(`batch.${id}`, null);
}

/** A page that is being closed cannot wait for a database: what is not written yet goes where the next tab finds it. */
function leaveUnsaved() {
  for (const draft of state.drafts) {
    const before = kept.get(draft.id), changes = changesOf(draft, before);
    if (Object.keys(changes).length) store.write(`unsaved.${draft.id}`, {changes, isNew: !before, batchId: draft.batch, batch: state.batches[draft.batch]});
  }
  for (const [id, batchId] of deleting) if (removed.has(id)) store.write(`unsaved.${id}`, {isGone: true, batchId});
  bus.postMessage({type: 'leaving', tab: TAB});
}

function takeUnsaved() {
  if (!state.loaded) return; // its drafts are not known yet
  for (const name of store.names('unsaved.')) {
    const left = store.read(name), id = name.slice(8);
    store.write(name, null);
    if (left?.isGone) {
      takeAway(id);
      deleteRecord(id, left.batchId);
    }
    if (!left?.changes) continue;
    let draft = state.drafts.find(draft => draft.id === id);
    if (!draft && left.isNew) {
      state.batches[left.batchId] ??= left.batch;
      draft = {...left.changes, lost: false, stopping: false};
      state.drafts.push(draft);
      state.drafts.sort(byTime);
    } else if (draft) {
      Object.assign(draft, merge(draft, left.changes));
    } else continue;
    save(draft);
    render();
  }
}

const resume = draft => draft.generation ? follow(draft) : send(draft);
const isElsewhere = draft => draft.owner !== TAB && Date.now() - (heard.get(draft.id) ?? 0) < SILENCE;

/** Tell the other tabs how a draft that this tab follows gets on: a browser has few connections, one tab has them. */
function tellProgress(draft) {
  const record = {id: draft.id};
  for (const name of PROGRESS) record[name] = draft[name];
  bus.postMessage({type: 'progress', record: structuredClone(record)});
}

const told = new Map();
function tellSoon(draft) {
  if (Date.now() - (told.get(draft.id) ?? 0) < 250) return;
  told.set(draft.id, Date.now());
  tellProgress(draft);
}

function watchOtherTabs() {
  bus.onmessage = ({data}) => {
    if (data.type === 'draft') {
      if (data.isNew) removed.delete(data.record.id);
      state.batches[data.record.batch] ??= data.batch;
      heard.set(data.record.id, Date.now());
      takeIn(data.record);
      if (!isLive(data.record)) unfollow(data.record.id);
    }
    if (data.type === 'gone') takeAway(data.id);
    if (data.type === 'progress' && kept.has(data.record.id)) {
      heard.set(data.record.id, Date.now());
      const draft = state.drafts.find(draft => draft.id === data.record.id);
      if (isLive(draft) && !sources.has(draft.id)) takeIn(data.record);
    }
    if (data.type === 'who') state.drafts.filter(draft => isLive(draft) && draft.owner === TAB).forEach(tellProgress);
    if (data.type === 'leaving') state.drafts.filter(draft => isLive(draft) && draft.owner === data.tab).forEach(draft => heard.set(draft.id, 0));
  };
  setInterval(() => {
    for (const draft of state.drafts.filter(isLive)) {
      if (draft.owner === TAB) tellProgress(draft);
      else if (state.loaded && !isElsewhere(draft)) resume(draft);
    }
  }, 1000);
  addEventListener('storage', event => { if (event.key?.startsWith('dccapi.unsaved.') && event.newValue) takeUnsaved(); });
  addEventListener('pagehide', leaveUnsaved);
  addEventListener('pageshow', event => { if (event.persisted) location.reload(); });
}
