'use strict';

// A whole catalogue in the browser: a table of courses in, drafts to review out. It writes what `catalogue.py run`
// writes, with the same fingerprints. IndexedDB is the only state: a draft counts once it is there. One tab writes,
// the one that holds the lock; the others follow. A block, so that its names are no one else's.
{
const MOST_IN_FLIGHT = 4;
const TRIES = 5; // of one course where the model, the engine or the connection failed in the middle
const LONGEST_PAUSE = 30; // seconds between two tries, where the service does not ask for more
const SILENCE = 60000; // ms without an event, after which the service is asked how far a draft is
const SPARE = 6; // rows above and below the window that are in the document
const BATCH = 500; // records that are read at once
const MAX_COURSE_ID = 200; // characters
const FLOATS = ['temperature', 'top_p', 'repeat_penalty'];
const INTEGERS = ['max_tokens', 'top_k', 'seed'];
const SWITCHES = {true: true, yes: true, 1: true, false: false, no: false, 0: false};
const OPTIONS = ['badge_style', 'badge_tone', 'badge_level', 'criterion_style', 'institution', 'institute_url',
  'custom_instructions', 'language', 'long_content', 'skills', ...FLOATS, ...INTEGERS];
const TEXTS = {title: 'badge_name', description: 'badge_description', criteria: 'criteria'};
const CARD = {title: 'row-name', description: 'row-description', criteria: 'row-criteria'}; // their controls
const ENCODINGS = ['utf-8', 'utf-16le', 'utf-16be', 'windows-1252', 'windows-1250', 'windows-1251', 'windows-1254', 'iso-8859-2',
  'macintosh', 'shift_jis', 'euc-kr', 'gb18030', 'big5'];
const PAUSED = Symbol('paused');

let isLoaded = false;
let catalogue = null; // {key, name, kind, ids, hasIds, running, reason}
let rows = []; // what the table shows of each row; drafts and courses are read when they are needed
let list = []; // the rows under the filter, by number
let active = -1; // the row under the keys, by number
let opened = null; // {file, table}: a file whose columns are being chosen
let shownRow = -1; // the row in the dialog
let isWriter = false;
let health; // what the service said last; undefined once it has failed
let flights = new Set(); // rows that are being written
let halting = new AbortController(); // ends the waits of a run that is paused
let told = ''; // what a run waits for
let times = []; // of the last drafts that came
let cursor = 0; // no row before it waits

const count = number => number.toLocaleString('en');
const counted = (number, noun) => `${count(number)} ${noun}${number === 1 ? '' : 's'}`;
const few = items => items.slice(0, 10).join(', ') + (items.length > 10 ? ` and ${count(items.length - 10)} more` : '');
const needsLook = row => row.status === 'done' && row.accepted === undefined && (row.notes > 0 || row.support === null);

// ---- fingerprints, as catalogue.py makes them

const PRIMES = Array.from({length: 312}, (_, n) => n).filter(n => n > 1 && ![2, 3, 5, 7, 11, 13, 17].some(p => p < n && n % p === 0));
const fraction = (number, root) => Math.floor((number ** (1 / root) % 1) * 2 ** 32) | 0;
const ROUNDS = PRIMES.map(prime => fraction(prime, 3));

/** SHA-256 in hexadecimal (FIPS 180-4). crypto.subtle is missing from pages over plain HTTP. */
function sha256(text) {
  const bytes = new TextEncoder().encode(text);
  const padded = new DataView(new ArrayBuffer((bytes.length + 72) >> 6 << 6));
  new Uint8Array(padded.buffer).set(bytes);
  padded.setUint8(bytes.length, 0x80);
  padded.setUint32(padded.byteLength - 8, Math.floor(bytes.length / 2 ** 29));
  padded.setUint32(padded.byteLength - 4, bytes.length << 3);
  const hash = Int32Array.from(PRIMES.slice(0, 8), prime => fraction(prime, 2));
  const words = new Int32Array(64);
  const turned = (word, bits) => word >>> bits | word << 32 - bits;
  for (let at = 0; at < padded.byteLength; at += 64) {
    let [a, b, c, d, e, f, g, h] = hash;
    for (let t = 0; t < 64; t++) {
      const near = words[t - 2], far = words[t - 15];
      words[t] = t < 16 ? padded.getInt32(at + 4 * t)
        : (turned(near, 17) ^ turned(near, 19) ^ near >>> 10) + words[t - 7] + (turned(far, 7) ^ turned(far, 18) ^ far >>> 3) + words[t - 16];
      const first = h + (turned(e, 6) ^ turned(e, 11) ^ turned(e, 25)) + (e & f ^ ~e & g) + ROUNDS[t] + words[t] | 0;
      const second = (turned(a, 2) ^ turned(a, 13) ^ turned(a, 22)) + (a & b ^ a & c ^ b & c) | 0;
      [a, b, c, d, e, f, g, h] = [first + second | 0, a, b, c, d + first | 0, e, f, g];
    }
    [a, b, c, d, e, f, g, h].forEach((value, index) => { hash[index] += value; });
  }
  return [...hash].map(word => (word >>> 0).toString(16).padStart(8, '0')).join('');
}

/** JSON as Python's json.dumps writes it. */
function pythonJson(value, name = '') {
  if (typeof value === 'number') return FLOATS.includes(name) && Number.isInteger(value) ? `${value}.0` : String(value);
  if (typeof value === 'boolean') return String(value);
  return JSON.stringify(value).replace(/[\x7f-\uffff]/g, letter => `\\u${letter.charCodeAt(0).toString(16).padStart(4, '0')}`);
}

function fingerprint(course, model) {
  const options = Object.keys(course.options).sort().map(name => `${pythonJson(name)}: ${pythonJson(course.options[name], name)}`);
  return sha256(`[${pythonJson(course.content)}, {${options.join(', ')}}, ${pythonJson(model)}]`).slice(0, 32);
}

// ---- what the browser keeps: the catalogue, its courses, and a record of each draft, by row

const settled = request => new Promise((resolve, reject) => {
  request.onsuccess = () => resolve(request.result);
  request.onerror = () => reject(request.error);
});

let database;
function openDatabase() {
  database ??= (() => {
    const request = indexedDB.open('dccapi.catalogue', 1);
    request.onupgradeneeded = () => ['catalogue', 'courses', 'drafts'].forEach(name => request.result.createObjectStore(name));
    return settled(request);
  })();
  return database;
}

/** What `action` makes of the stores, once all of it is on disk. */
async function within(mode, action) {
  const transaction = (await openDatabase()).transaction(['catalogue', 'courses', 'drafts'], mode, {durability: 'strict'});
  const complete = new Promise((resolve, reject) => {
    transaction.oncomplete = resolve;
    transaction.onabort = () => reject(transaction.error ?? new Error('aborted'));
  });
  complete.catch(() => {});
  const store = name => transaction.objectStore(name);
  const result = await action({catalogue: store('catalogue'), courses: store('courses'), drafts: store('drafts')});
  await complete;
  return result;
}

const read = (name, n) => within('readonly', stores => settled(stores[name].get(n)));

/** All drafts in the order of their rows; a few at a time, so that few are in memory. */
async function* allDrafts() {
  for (let from = 0; from < rows.length; from += BATCH) {
    const range = IDBKeyRange.bound(from, from + BATCH - 1);
    yield* await within('readonly', stores => settled(stores.drafts.getAll(range)));
  }
}

const channel = new BroadcastChannel('dccapi.catalogue');
const tell = message => channel.postMessage({key: catalogue?.key, ...message});

/** Change a row's draft, unless the catalogue is another one by now or `alter` gives nothing. */
async function change(n, key, alter) {
  const changed = await within('readwrite', async stores => {
    if ((await settled(stores.catalogue.get('current')))?.key !== key) return undefined;
    const record = alter(await settled(stores.drafts.get(n)) ?? {n, run: 0, status: 'waiting'});
    if (record) await settled(stores.drafts.put(record, n));
    return record;
  });
  if (!changed || catalogue?.key !== key) return;
  tell({n});
  show(n, changed);
}

/** Change what is kept of the catalogue itself. */
async function changeCatalogue(changes) {
  if (!catalogue) return;
  Object.assign(catalogue, changes);
  const key = catalogue.key;
  await within('readwrite', async stores => {
    const kept = await settled(stores.catalogue.get('current'));
    if (kept?.key === key) stores.catalogue.put({...kept, ...changes}, 'current');
  });
  tell({catalogue: true});
}

async function load() {
  const kept = await read('catalogue', 'current');
  catalogue = kept ?? null;
  rows = (kept?.ids ?? []).map(id => ({id, status: 'waiting', notes: 0}));
  for await (const record of allDrafts()) if (rows[record.n]) rows[record.n] = summaryOf(rows[record.n].id, record);
  [isLoaded, cursor, active, times] = [true, 0, -1, []];
  refilter();
}

channel.onmessage = async ({data}) => {
  if (data.all || data.key !== catalogue?.key) await load();
  else if (data.catalogue) catalogue = {...catalogue, ...await read('catalogue', 'current')};
  else if (data.flights && !isWriter) flights = new Set(data.flights);
  else if (data.n !== undefined) show(data.n, await read('drafts', data.n) ?? {n: data.n, status: 'waiting'});
  if (isWriter && !catalogue?.running) halting.abort();
  redraw();
  pump();
};

/** What the table shows of a draft. */
function summaryOf(id, {status, response, review, error, corrected, accepted}) {
  const notes = review?.notes ?? [];
  return {
    id, status, accepted, title: corrected?.title ?? response?.badge_name ?? '', support: review?.support ?? null,
    notes: notes.length, note: status === 'failed' ? error.detail : notes.length ? inWords(notes[0]) : '', isCorrected: Boolean(corrected),
  };
}

function show(n, record) {
  if (!rows[n]) return;
  const before = rows[n];
  rows[n] = summaryOf(before.id, record);
  if (before.status === 'waiting' && record.status !== 'waiting') times = [...times.slice(-30), Date.now()];
  if (record.status === 'waiting') cursor = Math.min(cursor, n);
  if (matches(n)) enlist(n);
  if (n === shownRow && !$('row-dialog').contains(document.activeElement?.closest('textarea'))) openRow(n, true).catch(showError);
  redraw();
}

// ---- a run

function lead() {
  const start = async () => {
    await load();
    isWriter = true;
    redraw();
    pump();
  };
  // Over plain HTTP there are no locks. Two tabs then ask with the same keys, and get the same drafts.
  if (!navigator.locks) return start();
  navigator.locks.request('dccapi.catalogue', () => new Promise((_, reject) => { start().catch(reject); })).catch(showError);
}

const limit = () => health ? Math.max(1, Math.min(MOST_IN_FLIGHT, health.max_concurrent_requests)) : 1;

function nextWaiting() {
  while (cursor < rows.length && rows[cursor].status !== 'waiting') cursor++;
  for (let n = cursor; n < rows.length; n++) if (rows[n].status === 'waiting' && !flights.has(n)) return n;
  return undefined;
}

/** Begin as many rows as may be in flight. */
function pump() {
  if (!isWriter || !catalogue?.running) return;
  if (halting.signal.aborted) halting = new AbortController();
  while (flights.size < limit()) {
    const n = nextWaiting();
    if (n === undefined) break;
    fly(n);
  }
  if (flights.size) return;
  halt();
  announce(`The catalogue is written. ${summary()}.`);
}

async function fly(n) {
  const key = catalogue.key;
  flights.add(n);
  redraw();
  try {
    const {run = 0} = await read('drafts', n) ?? {};
    const written = await writeRow(await read('courses', n), run);
    // A person, or another tab, may have been faster.
    await change(n, key, before => before.status === 'waiting' && before.run === run ? {...before, ...written} : undefined);
    told = '';
  } catch (reason) {
    if (reason !== PAUSED && catalogue?.key === key) halt(reasonOf(reason));
  } finally {
    flights.delete(n);
    tell({flights: [...flights]});
    redraw();
    pump();
  }
}

function reasonOf(error) {
  if (error.name === 'QuotaExceededError') return 'This browser keeps no more. Export what is written, and free some space.';
  return error.message;
}

/** The draft of a course, or why it has none. Throws PAUSED, and Problem where the service refuses all. */
async function writeRow(course, run) {
  const request = {content: course.content, ...course.options, ...(course.course_id && {course_id: course.course_id})};
  let pause = .5, tries = 0;
  for (;;) {
    if (!catalogue.running) throw PAUSED;
    let problem, mark = '';
    try {
      health ??= await (await api('health')).json();
      pump();
      mark = fingerprint(course, health.target_model);
      const {response, achievement, review, usage, model} = await generate(request, sha256(`${mark} ${course.id}${run ? ` ${run}` : ''}`));
      return {status: 'done', fingerprint: mark, response, achievement, review, usage, model, error: null};
    } catch (fault) {
      if (!(fault instanceof Problem) || [401, 403, 404, 405].includes(fault.status)) throw fault;
      problem = fault;
    }
    const canPass = !problem.status || problem.status === 408 || problem.status === 429 || problem.status >= 500;
    tries += !canPass ? TRIES : [0, 408, 429, 503].includes(problem.status) ? 0 : 1;
    if (tries >= TRIES) return failed(mark, health?.target_model ?? '', problem);
    const {target_model: model = ''} = health ?? {};
    if (!model || problem.status === 503 || !problem.status) health = undefined; // it may come back as another
    await held(Math.max(pause, problem.retryAfter), problem.message);
    pause = Math.min(2 * pause, LONGEST_PAUSE);
  }
}

const failed = (mark, model, {status, code, message}) => ({
  status: 'failed', fingerprint: mark, response: null, achievement: null, review: null, usage: null, model,
  error: {status, error_code: code || `http_${status}`, detail: message},
});

/** Wait, unless the run is paused. */
function held(seconds, reason) {
  told = `${reason} Waiting until ${clock(seconds)}.`;
  redraw();
  const {signal} = halting;
  return new Promise((resolve, reject) => {
    if (signal.aborted) return reject(PAUSED);
    const end = () => { clearTimeout(timer); reject(PAUSED); };
    const timer = setTimeout(() => { signal.removeEventListener('abort', end); told = ''; redraw(); resolve(); }, seconds * 1000);
    signal.addEventListener('abort', end, {once: true});
  });
}

/** The answer to a request. The generation goes on when this page is left, and the same key finds it again. */
async function generate(request, key) {
  const headers = {Prefer: 'respond-async', Priority: 'u=6', 'Idempotency-Key': key}; // RFC 9218: people, who have 3, go first
  const {id} = await (await api('generate', {method: 'POST', body: request, headers})).json();
  for (;;) {
    const final = await lastEvent(id);
    if (final) return {...final, response: final.content};
    const known = await api(`generations/${id}`).then(answer => answer.json(), problem => {
      if (problem.status !== 404) throw problem;
      throw new Problem('The service was restarted while this was written.', {status: 502, code: 'connection_lost'});
    });
    if (known.result) return known.result;
    if (known.error) throw new Problem(known.error.detail, {status: known.error.status, code: known.error.error_code});
    await new Promise(resolve => setTimeout(resolve, 1000));
  }
}

/** The final event; undefined where there was none, or nothing was heard. */
function lastEvent(id) {
  return new Promise(resolve => {
    const source = new EventSource(new URL(`generations/${id}/events?accumulated=false`, BASE));
    const end = final => {
      clearTimeout(timer);
      source.close();
      resolve(final);
    };
    const wait = () => setTimeout(end, SILENCE);
    let timer = wait();
    source.onmessage = ({data}) => {
      clearTimeout(timer);
      timer = wait();
      const event = JSON.parse(data);
      if (event.type === 'final') end(event);
      if (event.type === 'error') end(); // its status is in the generation's state
    };
    const say = text => { told = text; redraw(); };
    source.onopen = () => say('');
    source.onerror = () => {
      if (source.readyState === EventSource.CLOSED) end();
      else say(`${location.host} does not answer. What is being written goes on once it does.`);
    };
  });
}

function halt(reason = '') {
  catalogue.running = false; // at once: nothing more may begin
  told = '';
  halting.abort();
  changeCatalogue({running: false, reason}).catch(showError);
  if (reason) announce(`The catalogue is paused. ${reason}`);
  redraw();
}

async function goOn() {
  health = undefined;
  times = [];
  await changeCatalogue({running: true, reason: ''});
  redraw();
  pump();
}

/** Write rows anew: those that failed with the same key, so that nothing is written twice; a draft with another. */
async function again(numbers) {
  const {key} = catalogue;
  for (const n of numbers) {
    await change(n, key, before => ({n, run: before.run + (before.status === 'done'), status: 'waiting'}));
  }
  await goOn();
}

// ---- choosing columns

const plain = name => name.trim().replace(/[\s_-]+/g, '_').toLowerCase();
const ID_NAMES = /^(course_?)?(id|code|key|number|no|nr)$|^(kurs_?(id|nummer|nr)|id_curso|código|sku|crn)$/;
const TITLE_NAMES = /^(course_?)?(title|name)$|^(titel|titre|título|titolo|nombre|kursname|course|kurs)$/;

async function openTable(file, encoding = '') {
  showError();
  try {
    opened = {file, table: await readTable(file, encoding)};
  } catch (problem) {
    if (problem.code === 'wrong_encoding' && opened?.file === file) showError(problem);
    else {
      opened = null;
      showError(problem);
    }
    redraw();
    return;
  }
  offerColumns();
  redraw();
  $('columns-title').focus();
}

function offerColumns() {
  const {file, table} = opened;
  const {columns} = table, names = columns.map(plain);
  const values = index => table.rows.map(row => row.cells[index].trim());
  const isUnique = index => { const all = values(index); return all.every(Boolean) && new Set(all).size === all.length; };
  const length = index => table.rows.slice(0, 200).reduce((sum, row) => sum + row.cells[index].length, 0);
  const id = names.findIndex((name, index) => ID_NAMES.test(name) && isUnique(index));
  const free = columns.map((_, index) => index).filter(index => index !== id && !OPTIONS.includes(names[index]));
  const longest = free.reduce((best, index) => length(index) > length(best) ? index : best, free[0]);
  const content = names.includes('content') ? [names.indexOf('content')] : free.filter(index => index === longest || TITLE_NAMES.test(names[index]));
  setText($('columns-told'), `${file.name}: ${table.kind}. ${counted(table.rows.length, 'row')}, ${counted(columns.length, 'column')}.`);
  $('columns-encoding').hidden = !table.isText;
  const choice = (value, text, selected) => element('option', {value, textContent: text, selected});
  $('columns-id').replaceChildren(choice('', 'None: number the rows', id < 0), ...columns.map((name, index) => choice(index, name, index === id)));
  $('columns-content').replaceChildren(...columns.map((name, index) => {
    const box = element('input', {type: 'checkbox', name: 'content', value: index, checked: content.includes(index)});
    const sample = table.rows.find(row => row.cells[index].trim())?.cells[index].trim().replace(/\s+/g, ' ').slice(0, 90) ?? 'empty';
    return element('label', {className: 'choice'}, box, name, element('span', {className: 'hint', textContent: sample}));
  }));
  columnsChanged();
}

/** The courses as the form has them, what is wrong with them, and what a person should know of them. */
function coursesOf() {
  const {table} = opened, form = new FormData($('catalogue-columns'));
  const id = form.get('id') === '' ? -1 : Number(form.get('id')), content = form.getAll('content').map(Number);
  const names = table.columns.map(plain);
  const own = names.map((name, index) => [index, name]).filter(([index, name]) => index !== id && !content.includes(index)
    && OPTIONS.includes(name) && names.indexOf(name) === names.lastIndexOf(name));
  const shared = {};
  for (const control of $('columns-options').querySelectorAll('[data-option]')) {
    if (control.value.trim()) shared[control.dataset.option] = control.value.trim();
  }
  const lines = {missing: [], twice: [], wrong: [], empty: [], same: [], short: [], long: []};
  const ids = new Map(), contents = new Map(), fits = state.health.content_words_that_fit;
  const courses = table.rows.map(({line, cells}, n) => {
    const course = {n, id: id < 0 ? String(n + 1) : cells[id].trim(), content: contentOf(table.columns, content, cells), options: {...shared}};
    // A row's number says nothing of a course, so no achievement may be known by it.
    if (id >= 0 && [...course.id].length <= MAX_COURSE_ID) course.course_id = course.id;
    for (const [index, name] of own) {
      const value = optionOf(name, cells[index].trim());
      if (value === undefined) lines.wrong.push(`${line} (${name}: ${cells[index].trim().slice(0, 40)})`);
      else if (value !== '') course.options[name] = value;
    }
    if (!course.id) lines.missing.push(line);
    else if (ids.has(course.id)) lines.twice.push(`${line} (${course.id}, as in line ${ids.get(course.id)})`);
    else ids.set(course.id, line);
    const text = course.content.trim();
    if (!text) lines.empty.push(line);
    else if (contents.has(text)) lines.same.push(`${line} (as ${contents.get(text)})`);
    else contents.set(text, line);
    const words = wordCount(text);
    if (text && words < LITTLE) lines.short.push(line);
    if (fits && words > fits) lines.long.push(line);
    return course;
  });
  return {courses, lines, own, hasIds: id >= 0, hasContent: content.length > 0, fits};
}

/** One column as it is; several under their names. */
function contentOf(columns, chosen, cells) {
  if (chosen.length === 1) return cells[chosen[0]];
  return chosen.filter(index => cells[index].trim()).map(index => `${columns[index]}:\n${cells[index].trim()}`).join('\n\n');
}

/** An option as the service wants it; undefined where it cannot be that. */
function optionOf(name, value) {
  if (!value) return '';
  if (name === 'skills') return SWITCHES[value.toLowerCase()];
  if (INTEGERS.includes(name)) return /^[+-]?\d+$/.test(value) ? Number(value) : undefined;
  if (FLOATS.includes(name)) return Number.isFinite(Number(value)) ? Number(value) : undefined;
  return value;
}

function columnsChanged() {
  if (!opened) return;
  const {courses, lines, own, hasContent, fits} = coursesOf();
  const faults = [
    !hasContent && 'Choose at least one column that says what a course is about.',
    lines.missing.length && `No id in line ${few(lines.missing)}. Each course needs one of its own; or number the rows.`,
    lines.twice.length && `The same id again in line ${few(lines.twice)}. Each course needs one of its own; or number the rows.`,
    lines.wrong.length && `An option that cannot be read in line ${few(lines.wrong)}.`,
    hasContent && lines.empty.length === courses.length && 'The chosen columns are empty in every row.',
  ].filter(Boolean);
  const notes = [
    lines.empty.length && `${counted(lines.empty.length, 'row')} without content, which will be listed as failed: line ${few(lines.empty)}.`,
    lines.same.length && `${counted(lines.same.length, 'row')} with the content of another: line ${few(lines.same)}.`,
    lines.short.length && `${counted(lines.short.length, 'row')} of fewer than ${LITTLE} words, from which little can be written: line ${few(lines.short)}.`,
    lines.long.length && `${counted(lines.long.length, 'row')} longer than the ${count(fits)} words that fit, so condensed: line ${few(lines.long)}.`,
    own.length && `Options of each row, by the names of their columns: ${own.map(([, name]) => name).join(', ')}.`,
  ].filter(Boolean);
  $('columns-faults').replaceChildren(...faults.map(text => element('p', {textContent: text})));
  $('columns-notes').replaceChildren(...(notes.length || faults.length ? notes : ['Nothing stands out: each row has an id of its own and a content.']).map(text => element('li', {textContent: text})));
  const first = courses.find(course => course.content.trim());
  setText($('columns-first'), first ? first.content.trim().slice(0, 3000) : 'Nothing yet.');
  setText($('columns-write'), `Write ${counted(courses.length - (hasContent ? lines.empty.length : 0), 'draft')}`);
  $('columns-write').disabled = faults.length > 0;
}

async function beginCatalogue() {
  const {courses, hasIds} = coursesOf(), {file, table} = opened;
  const written = rows.filter(row => row.status === 'done').length;
  if (written && !confirm(`The browser keeps one catalogue. Replace ${catalogue.name} and its ${counted(written, 'draft')}? Export them first if you need them.`)) return;
  const made = {key: uid(), name: file.name, kind: table.kind, ids: courses.map(course => course.id), hasIds, running: true, reason: ''};
  const empty = failed('', '', {status: 422, code: 'no_content', message: 'This row has no content.'});
  try {
    await within('readwrite', async stores => {
      for (const store of Object.values(stores)) store.clear();
      stores.catalogue.put(made, 'current');
      for (const course of courses) {
        stores.courses.put(course, course.n);
        if (!course.content.trim()) stores.drafts.put({n: course.n, run: 0, ...empty, fingerprint: fingerprint(course, '')}, course.n);
      }
    });
  } catch (error) {
    return showError(new Problem(reasonOf(error)));
  }
  navigator.storage?.persist?.(); // a full disk then takes other pages' data first
  opened = null;
  halting.abort();
  [told, health] = ['', undefined];
  $('catalogue-filters').elements.find.value = '';
  $('catalogue-filters').elements.filter.value = 'all';
  await load();
  tell({all: true});
  pump();
  $('catalogue-grid').focus();
}

// ---- export

// What a spreadsheet takes for a formula gets an apostrophe in front (OWASP, CSV injection); so does what has one.
const shielded = cell => /^'*[=+\-@\t\r\n]/.test(cell) ? `'${cell}` : cell;
const quoted = cell => /[",\r\n]/.test(cell) ? `"${cell.replaceAll('"', '""')}"` : cell;
const COLUMNS = ['id', 'status', 'support', 'notes', 'accepted', ...Object.keys(TEXTS).map(name => `corrected_${name}`), ...Object.keys(TEXTS),
  'skills', 'language', 'model', 'error', 'fingerprint'];

const textsOf = response => ({
  title: response?.badge_name ?? '', description: response?.badge_description ?? '', criteria: response?.criteria?.narrative ?? '',
});

/** `Criteria, “1 year”: The course does not say this; check it.` */
function inWords({field, text, message}) {
  const named = (field ?? '').replace('badge_name', 'title').replace(/^badge_/, '');
  const where = [named && named[0].toUpperCase() + named.slice(1), text && `“${text}”`].filter(Boolean).join(', ');
  return where ? `${where}: ${message}` : message;
}

/** Without control characters, and without what DCC's dashboard takes for Handlebars. */
const tidied = text => text.replaceAll('\r\n', '\n').replace(/[\0-\x08\x0b-\x1f\x7f-\x9f]/g, '').trim()
  .replace(/\{(?=\{)/g, '{ ').replace(/\}(?=\})/g, '} ');

function inCells(record) {
  const {status, review, achievement, error, corrected = {}, accepted} = record;
  const aligned = (achievement?.alignment ?? []).map(one => `${one.targetName} (${one.targetUrl})`);
  const named = (achievement?.tag ?? []).filter(tag => !aligned.some(one => one.startsWith(`${tag} (`)));
  return {
    id: rows[record.n].id, status, model: record.model ?? '', fingerprint: record.fingerprint, ...textsOf(record.response),
    ...Object.fromEntries(Object.keys(TEXTS).map(name => [`corrected_${name}`, corrected[name] ?? ''])),
    accepted: accepted === undefined ? '' : accepted ? 'yes' : 'no', support: review?.support == null ? '' : review.support.toFixed(2),
    notes: (review?.notes ?? []).map(inWords).join('\n'), skills: [...aligned, ...named].join('; '), language: review?.language ?? '',
    error: error?.detail ?? '',
  };
}

/** For people: the lowest support first; before it what could not be measured, at the end what failed. */
async function exportCsv() {
  const found = [];
  for await (const record of allDrafts()) {
    if (record.status === 'waiting') continue;
    const cells = inCells(record);
    found.push({rank: record.status === 'failed' ? 2 : record.review?.support ?? -1, line: COLUMNS.map(name => quoted(shielded(cells[name]))).join(',')});
  }
  found.sort((a, b) => a.rank - b.rank);
  // The byte-order mark tells Excel that it is UTF-8.
  save(['\ufeff', COLUMNS.join(','), '\r\n', ...found.map(({line}) => `${line}\r\n`)], 'csv', 'text/csv');
}

/** drafts.jsonl as catalogue.py has it, corrected texts and all. */
async function exportJsonl() {
  const lines = [];
  for await (const record of allDrafts()) if (record.status !== 'waiting') lines.push(JSON.stringify(lineOf(record)) + '\n');
  save(lines, 'jsonl', 'application/jsonl');
}

function lineOf(record) {
  const {status, review, usage, model, error, corrected, accepted} = record;
  let {response, achievement} = record;
  const texts = {...textsOf(response), ...corrected};
  if (corrected) {
    const criteria = {narrative: texts.criteria};
    response = {badge_name: texts.title, badge_description: texts.description, criteria};
    achievement = {...achievement, name: texts.title, description: texts.description, criteria: {...achievement.criteria, ...criteria}};
  }
  const line = {id: rows[record.n].id, fingerprint: record.fingerprint, status, response, achievement, review, usage, model, error};
  return accepted === undefined ? line : {...line, accepted};
}

function save(parts, suffix, type) {
  const stem = catalogue.name.replace(/\.[^.]*$/, '') || 'catalogue';
  download(new Blob(parts, {type}), `${stem}-drafts.${suffix}`);
}

// ---- a row as a card

let looks = 0; // counts openings: only the last one is shown

/** Show a row's draft beside its course; again, where it is shown. */
async function openRow(n, isAgain = false) {
  const look = ++looks;
  await keepTexts();
  const key = catalogue.key;
  const [record, course] = [await read('drafts', n) ?? {n, status: 'waiting'}, await read('courses', n)];
  if (look !== looks || catalogue?.key !== key || !course || (isAgain && !$('row-dialog').open)) return;
  shownRow = active = n;
  const texts = {...textsOf(record.response), ...record.corrected}, isDone = record.status === 'done';
  setText($('row-title'), rows[n].title || `Course ${rows[n].id}`);
  setText($('row-place'), `${count(n + 1)} of ${count(rows.length)}${catalogue.hasIds ? ` · ${rows[n].id}` : ''}`);
  const [tone, words] = stateOf(n);
  $('row-state').className = `state dot ${tone}`;
  setText($('row-state'), words);
  for (const name of Object.keys(TEXTS)) {
    const input = $(CARD[name]);
    Object.assign(input, {value: texts[name], readOnly: !isDone, lang: languageOf(record)});
    input.closest('.field').hidden = !isDone;
    fitHeight(input);
  }
  $('row-draft').hidden = !isDone;
  drawRowArt(course);
  const skills = skillsOf(record).map(({name, framework}) => framework ? `${name} (${framework})` : name);
  setText($('row-skills'), skills.length ? `Skills: ${skills.join(', ')}` : '');
  setText($('row-error'), record.status === 'failed' ? record.error.detail : '');
  const notes = record.review?.notes ?? [];
  $('row-notes').replaceChildren(...notes.map(note => element('li', {textContent: inWords(note)})));
  $('row-checks').hidden = !notes.length;
  setText($('row-support'), supportText(rows[n].support) ? `${supportText(rows[n].support)} of the words are in the course` : isDone ? 'Support could not be measured' : '');
  setText($('row-course'), course.content.trim() || 'Nothing.');
  drawRowActions(record, isDone);
  if (!$('row-dialog').open) $('row-dialog').showModal();
  redraw();
}

function drawRowActions({status, accepted, corrected}, isDone) {
  const place = list.indexOf(shownRow);
  $('row-accept').hidden = $('row-refuse').hidden = !isDone;
  setText($('row-accept'), accepted === true ? 'Accepted' : 'Accept');
  setText($('row-refuse'), accepted === false ? 'Refused' : 'Refuse');
  $('row-accept').setAttribute('aria-pressed', String(accepted === true));
  $('row-refuse').setAttribute('aria-pressed', String(accepted === false));
  $('row-again').hidden = status === 'waiting';
  $('row-back').hidden = !corrected;
  $('row-previous').disabled = place <= 0;
  $('row-next').disabled = place < 0 || place === list.length - 1;
}

function drawRowArt(course) {
  $('row-art').replaceChildren(drawBadge({name: $('row-title').textContent, level: course.options.badge_level, institution: course.options.institution}));
}

/** Keep what was typed, where it differs from the draft. */
async function keepTexts() {
  if (shownRow < 0 || !isTyped) return;
  isTyped = false;
  const typed = Object.fromEntries(Object.keys(TEXTS).map(name => [name, tidied($(CARD[name]).value)]));
  await change(shownRow, catalogue.key, before => {
    if (before.status !== 'done') return undefined;
    const texts = textsOf(before.response);
    const corrected = Object.fromEntries(Object.entries(typed).filter(([name, text]) => text && text !== texts[name].trim()));
    const {corrected: _, ...rest} = before;
    return Object.keys(corrected).length ? {...rest, corrected} : rest;
  });
}
let isTyped = false;
const keepTextsSoon = debounced(300, () => keepTexts().catch(showError));

/** A person's word on a draft; the same word again takes it back. */
async function judge(n, accepted) {
  await keepTexts();
  await change(n, catalogue.key, before => before.status === 'done'
    ? {...before, accepted: before.accepted === accepted ? undefined : accepted} : undefined);
}

/** Judge the row in the dialog and go to the next that nobody has judged. */
async function judgeShown(accepted) {
  const n = shownRow;
  await judge(n, accepted);
  if (rows[n].accepted === undefined) return openRow(n);
  const next = list.slice(list.indexOf(n) + 1).find(other => rows[other].status === 'done' && rows[other].accepted === undefined);
  if (next !== undefined) return openRow(next);
  $('row-dialog').close();
  toast('No draft below this one is left to judge.');
}

const step = by => openRow(list[list.indexOf(shownRow) + by]);

async function writeAgain() {
  const n = shownRow, {key} = catalogue, before = await read('drafts', n);
  $('row-dialog').close();
  await again([n]);
  if (before.status !== 'done') return;
  toast(`Row ${count(n + 1)} is being written again.`, () => change(n, key, () => before));
}

// ---- the view

let drawing;
function redraw() {
  drawing ??= requestAnimationFrame(() => { drawing = undefined; drawView(); });
}

const isOpen = () => location.hash.startsWith('#catalogue');

function switchView() {
  const isCatalogue = isOpen();
  $('catalogue').hidden = !isCatalogue;
  document.body.classList.toggle('in-catalogue', isCatalogue);
  for (const [link, isCurrent] of [[$('to-catalogue'), isCatalogue], [$('to-drafts'), !isCatalogue]]) {
    if (isCurrent) link.setAttribute('aria-current', 'page');
    else link.removeAttribute('aria-current');
  }
  const skip = document.querySelector('.skip');
  skip.href = isCatalogue ? '#catalogue-title' : '#drafts-title';
  skip.textContent = isCatalogue ? 'Skip to the catalogue' : 'Skip to the drafts';
  redraw();
}

function showError(problem) {
  setText($('catalogue-error'), problem ? problem.message : '');
  redraw();
}

function countRows() {
  const counts = {all: rows.length, look: 0, failed: 0, accepted: 0, done: 0};
  for (const row of rows) {
    counts.done += row.status === 'done';
    counts.failed += row.status === 'failed';
    counts.accepted += row.accepted === true;
    counts.look += needsLook(row);
  }
  return {...counts, left: counts.all - counts.done - counts.failed};
}

function summary(counts = countRows()) {
  const failures = counts.failed ? `, ${count(counts.failed)} failed` : '';
  return `${count(counts.done)} of ${counted(counts.all, 'draft')} written${failures}`;
}

function timeLeft(left) {
  if (times.length < 4 || !left) return '';
  const seconds = (Date.now() - times[0]) / 1000 / times.length * left;
  const told = seconds < 90 ? `${Math.ceil(seconds)} s` : seconds < 5400 ? `${Math.ceil(seconds / 60)} min` : `${(seconds / 3600).toFixed(1)} hours`;
  return `about ${told} left, until ${clock(seconds)}`;
}

/** The time of day in so many seconds, with the day where that is not today. */
function clock(seconds) {
  const end = new Date(Date.now() + seconds * 1000), isToday = end.toDateString() === new Date().toDateString();
  const time = {hour: '2-digit', minute: '2-digit', ...(seconds < 90 && {second: '2-digit'}), hourCycle: 'h23'};
  return end.toLocaleString('en', isToday ? time : {weekday: 'short', ...time});
}

function drawView() {
  const counts = countRows();
  const {running = false} = catalogue ?? {};
  const all = count(counts.all), ended = count(counts.done + counts.failed);
  setText($('catalogue-count'), catalogue ? ` ${ended.padStart(all.length, '\u2007')}/${all}` : ''); // as wide at the end as at the start
  if (running) document.title = `${ended} of ${all} · Badge drafts`;
  else if (/ of .* · /.test(document.title)) document.title = 'Badge drafts';
  if (!isOpen()) return;
  $('catalogue-empty').hidden = !isLoaded || Boolean(opened || catalogue);
  $('catalogue-columns').hidden = !opened;
  $('catalogue-run').hidden = Boolean(opened) || !catalogue;
  $('catalogue-about').hidden = Boolean(opened || catalogue);
  if (!catalogue || opened) return;
  drawProgress(counts);
  $('catalogue-filters').style.setProperty('--digits', all.length);
  for (const [name, number] of Object.entries({all: counts.all, look: counts.look, failed: counts.failed, accepted: counts.accepted})) {
    setText($(`count-${name}`), count(number));
  }
  drawGrid();
}

function drawProgress(counts) {
  const {running, reason, name} = catalogue;
  setText($('catalogue-name'), name);
  Object.assign($('catalogue-progress'), {max: counts.all, value: counts.done + counts.failed});
  const now = running ? timeLeft(counts.left) : flights.size ? `pausing, ${flights.size} being written` : counts.left ? `paused, ${count(counts.left)} left` : '';
  setText($('catalogue-told'), [summary(counts), now].filter(Boolean).join(' · '));
  const other = running && !isWriter ? 'Another tab of this browser writes; this one follows.' : '';
  setText($('catalogue-wait'), told || reason || other);
  $('catalogue-pause').hidden = !counts.left;
  setText($('catalogue-pause'), running ? 'Pause' : 'Go on');
  $('catalogue-retry').hidden = !counts.failed || running;
  $('catalogue-csv').disabled = $('catalogue-jsonl').disabled = counts.done + counts.failed === 0;
}

// ---- the table: only the rows in the window are in the document

const chosenFilter = () => $('catalogue-filters').elements.filter.value;

function matches(n) {
  const row = rows[n], sought = $('catalogue-find').value.trim().toLowerCase();
  const filter = {all: true, look: needsLook(row), failed: row.status === 'failed', accepted: row.accepted === true}[chosenFilter()];
  return filter && (!sought || row.id.toLowerCase().includes(sought) || row.title?.toLowerCase().includes(sought));
}

/** Rows that match no longer stay until the filter is set again: nothing moves under a reader. */
function refilter() {
  list = rows.map((_, n) => n).filter(matches);
  if (!list.includes(active)) active = list[0] ?? -1;
  $('catalogue-grid').scrollTop = 0;
  redraw();
}

/** Put a row into the list, in its place. */
function enlist(n) {
  let low = 0, high = list.length;
  while (low < high) {
    const middle = (low + high) >> 1;
    if (list[middle] < n) low = middle + 1;
    else high = middle;
  }
  if (list[low] !== n) list.splice(low, 0, n);
}

const drawn = new Map(); // row number: its element
const heightOf = name => parseFloat(getComputedStyle($('catalogue-grid')).getPropertyValue(name));

function drawGrid() {
  const grid = $('catalogue-grid'), row = heightOf('--row'), top = grid.scrollTop;
  grid.style.setProperty('--rows', rows.length);
  grid.setAttribute('aria-rowcount', list.length + 1);
  $('catalogue-space').style.height = `${list.length * row}px`;
  $('catalogue-none').hidden = list.length > 0;
  const first = Math.max(0, Math.floor(top / row) - SPARE), last = Math.min(list.length, Math.ceil((top + grid.clientHeight) / row) + SPARE);
  const visible = list.slice(first, last), wanted = new Set(visible);
  for (const [n, made] of drawn) if (!wanted.has(n)) { made.remove(); drawn.delete(n); }
  let before = null;
  visible.forEach((n, index) => {
    const made = drawn.get(n) ?? makeRow(n);
    if (made.previousElementSibling !== before || !made.isConnected) (before ? before.after(made) : $('catalogue-space').prepend(made));
    before = made;
    fillRow(n, first + index, made, row);
  });
  if (drawn.has(active)) grid.setAttribute('aria-activedescendant', `catalogue-row-${active}`);
  else grid.removeAttribute('aria-activedescendant');
}

function makeRow(n) {
  const made = $('catalogue-row').content.cloneNode(true).firstElementChild;
  made.id = `catalogue-row-${n}`;
  made.dataset.n = n;
  drawn.set(n, made);
  return made;
}

const supportText = support => support == null ? '' : `${Math.round(support * 100)} %`;

function stateOf(n) {
  const {status, accepted} = rows[n];
  if (status === 'failed') return ['bad', 'Failed'];
  if (status === 'waiting') return ['', flights.has(n) ? 'Being written' : 'Waiting'];
  if (accepted !== undefined) return accepted ? ['good', 'Accepted'] : ['bad', 'Refused'];
  return needsLook(rows[n]) ? ['warn', 'Needs a look'] : ['', 'Written'];
}

function fillRow(n, place, made, height) {
  const row = rows[n], [tone, words] = stateOf(n);
  const key = `${place} ${height} ${words} ${n === active}`;
  if (made.shown === row && made.key === key) return;
  Object.assign(made, {shown: row, key});
  made.style.transform = `translateY(${place * height}px)`;
  made.setAttribute('aria-rowindex', place + 2);
  made.setAttribute('aria-selected', String(n === active));
  made.className = `line-of ${row.status}`;
  const [title, support, notes, state] = made.children;
  setText(title.children[0], row.title || row.id);
  setText(title.children[1], [row.title && row.id, row.isCorrected && 'corrected'].filter(Boolean).join(' · '));
  setText(support, supportText(row.support));
  setText(notes, (row.note ?? '') + (row.notes > 1 ? ` And ${row.notes - 1} more.` : ''));
  const [told, button] = state.children;
  told.className = `state dot ${tone}`;
  setText(told, words);
  button.hidden = row.status !== 'done';
  setText(button, row.accepted ? 'Take back' : 'Accept');
}

/** Go to a row of the list with the keys. */
function goTo(place) {
  if (!list.length) return;
  const grid = $('catalogue-grid'), row = heightOf('--row'), head = heightOf('--head');
  const at = Math.max(0, Math.min(list.length - 1, place));
  active = list[at];
  const above = at * row, below = above + row + head - grid.clientHeight;
  if (grid.scrollTop > above) grid.scrollTop = above;
  if (grid.scrollTop < below) grid.scrollTop = below;
  drawGrid();
}

function onGridKey(event) {
  if (event.altKey || event.ctrlKey || event.metaKey) return;
  const place = list.indexOf(active), page = Math.max(1, Math.floor($('catalogue-grid').clientHeight / heightOf('--row')) - 1);
  const to = {ArrowDown: place + 1, ArrowUp: place - 1, PageDown: place + page, PageUp: place - page, Home: 0, End: list.length - 1}[event.key];
  if (to !== undefined) goTo(to);
  else if ((event.key === 'Enter' || event.key === ' ') && place >= 0) openRow(active).catch(showError);
  else if (event.key.toLowerCase() === 'a' && place >= 0) judge(active, true).catch(showError);
  else return;
  event.preventDefault();
}

function onGridClick(event) {
  const made = event.target.closest('[data-n]');
  if (!made) return;
  active = Number(made.dataset.n);
  if (event.target.closest('button')) judge(active, true).catch(showError);
  else openRow(active).catch(showError);
  redraw();
}

// ---- events

const isTable = file => /\.(csv|tsv|tab|xlsx|xlsm)$/i.test(file.name);

/** A dropped table is taken here; the page's own handler gets all else. */
function takeTables() {
  const area = $('catalogue');
  const carriesFiles = event => [...event.dataTransfer?.types ?? []].includes('Files');
  addEventListener('dragover', event => {
    if (!isOpen() || !carriesFiles(event)) return;
    event.preventDefault();
    area.classList.add('dropping-table');
  }, true);
  addEventListener('dragleave', event => { if (!event.relatedTarget) area.classList.remove('dropping-table'); });
  addEventListener('drop', event => {
    area.classList.remove('dropping-table');
    const file = event.dataTransfer?.files[0];
    if (!file || !(isOpen() || isTable(file))) return;
    event.preventDefault();
    event.stopImmediatePropagation();
    $('composer').classList.remove('dropping');
    location.hash = '#catalogue';
    openTable(file);
  }, true);
}

function listenToColumns() {
  const choice = name => [element('option', {value: '', textContent: 'Not specified'}), ...CHOICES[name].map(text => element('option', {textContent: text}))];
  for (const name of Object.keys(CHOICES)) $(`all-${name}`).append(...choice(name));
  $('columns-encodings').append(element('option', {value: '', textContent: 'As it seems'}), ...ENCODINGS.map(name => element('option', {textContent: name})));
  $('columns-encodings').onchange = event => { event.stopPropagation(); if (opened) openTable(opened.file, event.target.value); };
  $('catalogue-columns').addEventListener('input', debounced(120, columnsChanged));
  $('catalogue-columns').addEventListener('submit', event => { event.preventDefault(); columnsChanged(); if (!$('columns-write').disabled) beginCatalogue(); });
  $('columns-cancel').onclick = () => { opened = null; showError(); $('catalogue-title').focus(); };
  for (const id of ['catalogue-open', 'catalogue-other']) $(id).onclick = () => $('catalogue-file').click();
  $('catalogue-file').onchange = () => {
    if ($('catalogue-file').files[0]) {
      $('columns-encodings').value = '';
      openTable($('catalogue-file').files[0]);
    }
    $('catalogue-file').value = '';
  };
}

function listenToRun() {
  const guarded = action => (...given) => Promise.resolve(action(...given)).catch(showError);
  $('catalogue-pause').onclick = guarded(() => catalogue.running ? halt() : goOn());
  $('catalogue-retry').onclick = guarded(() => again(rows.flatMap((row, n) => row.status === 'failed' ? [n] : [])));
  $('catalogue-csv').onclick = guarded(exportCsv);
  $('catalogue-jsonl').onclick = guarded(exportJsonl);
  $('catalogue-filters').addEventListener('input', debounced(60, refilter));
  $('catalogue-filters').addEventListener('submit', event => event.preventDefault());
  const grid = $('catalogue-grid');
  grid.addEventListener('scroll', redraw, {passive: true});
  grid.addEventListener('keydown', onGridKey);
  grid.addEventListener('click', onGridClick);
  new ResizeObserver(redraw).observe(grid);
  $('row-accept').onclick = guarded(() => judgeShown(true));
  $('row-refuse').onclick = guarded(() => judgeShown(false));
  $('row-previous').onclick = guarded(() => step(-1));
  $('row-next').onclick = guarded(() => step(1));
  $('row-again').onclick = guarded(writeAgain);
  $('row-back').onclick = guarded(async () => {
    isTyped = false;
    await change(shownRow, catalogue.key, ({corrected: _, ...rest}) => rest);
    await openRow(shownRow);
  });
  $('row-dialog').addEventListener('input', () => { isTyped = true; keepTextsSoon(); });
  $('row-dialog').addEventListener('close', guarded(async () => {
    await keepTexts();
    shownRow = -1;
    $('catalogue-grid').focus();
    goTo(list.indexOf(active));
  }));
  $('row-dialog').addEventListener('keydown', event => {
    if (event.key === 'Enter' && (event.ctrlKey || event.metaKey) && !$('row-accept').hidden) guarded(judgeShown)(true);
  });
  addEventListener('pagehide', () => { keepTexts(); });
}

/** Nothing of the catalogue stays in this browser. */
async function forget() {
  if (catalogue?.running) halt();
  await within('readwrite', async stores => { for (const store of Object.values(stores)) store.clear(); });
  tell({all: true});
  await load();
}

addEventListener('hashchange', switchView);
document.addEventListener('forget', () => forget().catch(showError));
listenToColumns();
listenToRun();
takeTables();
switchView();
load().then(lead).catch(error => showError(new Problem(`This browser keeps nothing for this page, so no catalogue can be written here: ${error.message}`)));
setInterval(() => { if (catalogue?.running) redraw(); }, 1000);
}
