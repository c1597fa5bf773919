'use strict';

const BASE = new URL('.', location.href);
const KEPT = 24; // drafts that the browser keeps
const FIELDS = {
  name: {label: 'Name', key: 'badge_name'},
  description: {label: 'Description', key: 'badge_description'},
  criteria: {label: 'Criteria', key: 'criteria'},
};
const CHOICES = {
  badge_level: ['Beginner', 'Intermediate', 'Advanced', 'Expert'],
  badge_style: ['Professional', 'Academic', 'Industry', 'Technical', 'Creative'],
  badge_tone: ['Authoritative', 'Encouraging', 'Detailed', 'Concise', 'Engaging'],
  criterion_style: ['Task-Oriented', 'Evidence-Based', 'Outcome-Focused'],
};
const SAMPLING = {
  temperature: 'Temperature, 0 to 2', top_p: 'Top p, 0 to 1', top_k: 'Top k, 1 to 100',
  repeat_penalty: 'Repeat penalty, 0 to 2', max_tokens: 'Longest, in tokens', seed: 'Seed',
};
const SAMPLES = [
  {
    title: 'Incident command',
    source: 'IS-100.C: Introduction to the Incident Command System, FEMA. US federal government work, public domain.',
    text: `ICS 100 (IS-100.C) – Introduction to the Incident Command System

FEMA recognizes that effective planning and management of incident issues requires extensive training and experience.

IS-100.C introduces the Incident Command System (ICS) and provides the foundation for higher level ICS training. This course describes the history, features and principles, and organizational structure of the Incident Command System. It also explains the relationship between ICS and the National Incident Management System (NIMS).

At the completion of this course, you should be able to:
• Explain the principles and basic structure of the Incident Command System (ICS).
• Describe the NIMS management characteristics that are the foundation of the ICS.
• Describe the ICS functional areas and the roles of the Incident Commander and Command Staff.
• Describe the General Staff roles within ICS.
• Identify how NIMS management characteristics apply to ICS for a variety of roles and discipline areas.`,
  },
  {
    title: 'Calculus and discrete mathematics',
    source: 'Core math of OSSU Computer Science, github.com/ossu/computer-science. MIT licence.',
    text: `Calculus 1A: Differentiation; Calculus 1B: Integration; Calculus 1C: Coordinate Systems & Infinite Series; and Mathematics for Computer Science.

Discrete math (Math for CS) is a prerequisite and closely related to the study of algorithms and data structures. Calculus both prepares students for discrete math and helps students develop mathematical maturity.

Topics covered: discrete mathematics, mathematical proofs, basic statistics, O-notation, discrete probability and more.`,
  },
  {
    title: 'La terminal de Unix',
    source: 'La terminal de Unix, Software Carpentry, github.com/swcarpentry/shell-novice-es, shortened. CC BY 4.0.',
    text: `La terminal de Unix ha existido por más tiempo que la mayoría de sus usuarios. Ha sobrevivido tanto tiempo porque es una herramienta poderosa que permite a las personas hacer cosas complejas con sólo unas pocas teclas. Lo más importante es que ayuda a combinar programas existentes de nuevas maneras y automatizar tareas repetitivas, en vez de estar escribiendo las mismas cosas una y otra vez.

El uso del terminal o shell es fundamental para usar muchas otras herramientas poderosas y recursos informáticos (incluidos los supercomputadores o "computación de alto rendimiento"). Esta lección te guiará en el camino hacia el uso eficaz de estos recursos.

Esta lección te guía a través de los principios básicos de los sistemas de archivos y la terminal shell.`,
  },
];
const LIVE = ['sending', 'queued', 'writing'];

// What the page knows. A draft and its batch (the request that its drafts share) are plain records that storage can hold.
const state = {drafts: [], batches: {}, health: {}, protocol: '', error: []};
const cards = new Map(); // draft id: its elements
const sources = new Map(); // draft id: EventSource
const rewrites = new Map(); // draft id: {field, controller}
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
function hideToast() {
  if ($('toast').contains(document.activeElement)) $('drafts-title').focus();
  $('toast').classList.remove('shown');
  $('toast-text').textContent = '';
}

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

// ---- the service

class Problem extends Error {
  constructor(detail, {status = 0, code = '', errors = [], retryAfter = 0} = {}) {
    super(detail);
    Object.assign(this, {status, code, errors, retryAfter});
  }
}

async function problemIn(response) {
  const body = await response.json().catch(() => ({}));
  const detail = body.detail || `The service answered ${response.status}. Try again in a moment.`;
  const retryAfter = Number(response.headers.get('Retry-After')) || 0;
  return new Problem(detail, {status: response.status, code: body.error_code, errors: body.errors, retryAfter});
}

const storedKey = () => store.read('key', sessionStorage) || store.read('key') || '';

async function api(path, {method = 'GET', body, headers = {}, signal} = {}) {
  for (;;) {
    const key = storedKey();
    const sent = {...(body && {'Content-Type': 'application/json'}), ...(key && {Authorization: `Bearer ${key}`}), ...headers};
    const options = {method, signal, headers: sent, body: body && JSON.stringify(body), cache: 'no-store'};
    const response = await fetch(new URL(path, BASE), options).catch(error => {
      if (error.name === 'AbortError') throw error;
      throw new Problem(`${location.host} does not answer. Check your connection and that the service runs, then try again.`, {code: 'unreachable'});
    });
    if (response.ok) return response;
    const problem = await problemIn(response);
    if (response.status !== 401) throw problem;
    if (!await askForKey(key)) throw new Problem('This service needs a key. Ask whoever runs it for one, and try again.', {status: 401});
  }
}

let asking;
function askForKey(refused) {
  if (storedKey() !== refused) return true; // another request has asked in the meantime
  asking ??= new Promise(resolve => {
    const dialog = $('key-dialog');
    $('key').value = '';
    dialog.returnValue = '';
    dialog.showModal();
    dialog.addEventListener('close', () => {
      asking = undefined;
      if (dialog.returnValue !== 'use') return resolve(false);
      store.write('key', null);
      store.write('key', $('key').value, $('keep-key').checked ? localStorage : sessionStorage);
      resolve(true);
      checkHealth();
    }, {once: true});
  });
  return asking;
}

// ---- writing drafts

function newDraft(batch, number, seed) {
  return {id: uid(), batch, number, created: state.batches[batch].created, seed, ...blank()};
}

function blank() {
  return {
    state: 'sending', run: uid(), generation: null, position: 0, wait: 0, tokens: 0, started: 0, firstToken: 0, seconds: 0,
    fields: {name: '', description: '', criteria: ''}, achievement: null, finish: '', error: null, lost: false, stopping: false, bare: false,
  };
}

async function writeDrafts() {
  const {request, count} = readForm();
  state.error = [];
  if (!request.content) return refuseForm(new Problem('Paste a course description first, or take a sample.', {errors: [{loc: ['content'], msg: ''}]}));
  markInvalid([]);
  const {seed = randomSeed(), ...shared} = request;
  const batch = uid();
  state.batches[batch] = {request: shared, created: Date.now()};
  const drafts = Array.from({length: count}, (_, index) => newDraft(batch, index + 1, seed + index));
  state.drafts = [...drafts, ...state.drafts];
  state.drafts.slice(KEPT).forEach(dropDraft);
  render();
  if ($('drafts-title').getBoundingClientRect().top > innerHeight * .7) $('drafts-title').scrollIntoView({behavior: 'smooth'});
  // The first one tells whether the request is in order; four equal complaints would help nobody.
  const problem = await send(drafts[0]);
  if (problem && [400, 401, 413, 422].includes(problem.status)) {
    drafts.forEach(dropDraft);
    return refuseForm(problem);
  }
  announce(`Writing ${plural(count, 'draft')}.`);
  drafts.slice(1).filter(draft => draft.state === 'sending').forEach(send);
}

/** Ask for a generation. The key makes a repetition, after a reload or a cut, find the same one again. */
async function send(draft) {
  const run = draft.run;
  save(draft);
  render();
  try {
    const body = {...requestOf(draft), seed: draft.seed};
    const response = await api('generate', {method: 'POST', body, headers: {Prefer: 'respond-async', 'Idempotency-Key': run}});
    const {id} = await response.json();
    if (draft.run !== run) return void api(`generations/${id}`, {method: 'DELETE'}).catch(() => {});
    Object.assign(draft, {generation: id, state: 'queued'});
    save(draft);
    if (draft.stopping) return stop(draft);
    follow(draft);
    checkHealthSoon();
  } catch (problem) {
    if (draft.run === run) fail(draft, problem);
    return problem;
  }
}

/** Show a generation's events as they come; the EventSource resumes by itself after a cut. */
function follow(draft) {
  sources.get(draft.id)?.close();
  const source = new EventSource(new URL(`generations/${draft.generation}/events?partial=true&accumulated=false`, BASE));
  sources.set(draft.id, source);
  const on = (name, handle) => source.addEventListener(name, event => {
    const data = JSON.parse(event.data);
    // An id tells how many tokens its reader has; the last event's counts itself.
    if (data.type !== 'final' && data.type !== 'error') draft.tokens = Number(event.lastEventId.split('.').pop());
    draft.lost = false;
    handle(data);
    render();
  });
  on('queue', data => {
    Object.assign(draft, {position: data.position, wait: data.estimated_wait, state: data.position ? 'queued' : 'writing'});
    if (!data.position) draft.started ||= Date.now();
  });
  on('partial', data => {
    draft.fields = fieldsOf(data.badge);
  });
  on('message', data => {
    if (data.type === 'token' && !draft.firstToken) {
      draft.firstToken = Date.now();
      save(draft);
    }
    if (data.type === 'final') finish(draft, data);
    if (data.type === 'error') fail(draft, new Problem(data.error, {code: data.error_code}));
  });
  source.onopen = () => { draft.lost = false; render(); };
  source.onerror = () => {
    draft.lost = true;
    render();
    if (source.readyState === EventSource.CLOSED) lookUp(draft);
  };
}

/** What became of a generation whose events came to no end here. */
async function lookUp(draft) {
  const {run, generation} = draft;
  try {
    const known = await (await api(`generations/${generation}`)).json();
    if (draft.run !== run || !isLive(draft)) return;
    if (known.result) finish(draft, {...known.result, content: known.result.response});
    else if (known.error) fail(draft, new Problem(known.error.detail, {code: known.error.error_code}));
    else setTimeout(() => draft.run === run && isLive(draft) && follow(draft), 1000);
  } catch (problem) {
    if (draft.run !== run || !isLive(draft)) return;
    if (problem.status === 404) fail(draft, new Problem('The service knows this draft no longer; perhaps it was restarted. Write it again.', {code: 'forgotten'}));
    else setTimeout(() => draft.run === run && isLive(draft) && lookUp(draft), 3000);
  }
}

const fieldsOf = badge => ({
  name: badge.badge_name ?? '', description: badge.badge_description ?? '', criteria: badge.criteria?.narrative ?? '',
});
const badgeOf = draft => ({
  badge_name: draft.fields.name, badge_description: draft.fields.description, criteria: {narrative: draft.fields.criteria},
});

function end(draft, outcome) {
  sources.get(draft.id)?.close();
  sources.delete(draft.id);
  const seconds = draft.started ? (Date.now() - draft.started) / 1000 : 0;
  Object.assign(draft, {seconds, rate: rateOf(draft), lost: false, stopping: false, ...outcome});
  save(draft);
  render();
  checkHealthSoon();
}

function finish(draft, final) {
  draft.tokens = final.usage.completion_tokens;
  end(draft, {state: 'done', fields: fieldsOf(final.content), achievement: final.achievement, finish: final.finish_reason, error: null});
  announce(`Draft ${draft.number} is finished: ${draft.fields.name}`);
}

function fail(draft, problem) {
  const stopped = problem.code === 'cancelled';
  const bare = !Object.values(draft.fields).some(text => text);
  end(draft, {state: stopped ? 'stopped' : 'failed', bare, error: stopped ? null : {detail: problem.message, retryAfter: problem.retryAfter}});
  if (!stopped) announce(`Draft ${draft.number} failed. ${problem.message}`);
}

async function stop(draft) {
  rewrites.get(draft.id)?.controller.abort();
  if (!isLive(draft)) return;
  draft.stopping = true;
  render();
  if (!draft.generation) return; // `send` comes back here when there is something to stop
  if (!sources.has(draft.id)) follow(draft);
  try {
    await api(`generations/${draft.generation}`, {method: 'DELETE'});
  } catch (problem) {
    draft.stopping = false;
    if (problem.status === 404) lookUp(draft);
    else toast(problem.message);
    render();
  }
}

function again(draft) {
  const before = structuredClone(draft);
  Object.assign(draft, blank(), {seed: randomSeed()});
  send(draft);
  draw(); // now, or there is no Stop yet to take the focus
  cards.get(draft.id).act.stop.focus();
  if (isWhole(before)) {
    toast(`Draft ${draft.number} is being written again.`, async () => {
      if (isLive(draft)) stop(draft);
      sources.get(draft.id)?.close();
      Object.assign(draft, before);
      save(draft);
      render();
    });
  }
}

/** Write one field anew to suit the rest. */
async function rewrite(draft, field) {
  const before = draft.fields[field];
  const controller = new AbortController();
  rewrites.set(draft.id, {field, controller});
  draft.error = null;
  draw();
  cards.get(draft.id).act.stop.focus();
  try {
    const body = {...requestOf(draft), seed: randomSeed(), badge: badgeOf(draft), field: FIELDS[field].key};
    const headers = {Accept: 'text/event-stream'};
    const response = await api('regenerate-field?partial=true&accumulated=false', {method: 'POST', body, headers, signal: controller.signal});
    let final;
    for await (const data of eventsIn(response)) {
      if (data.type === 'error') throw new Problem(data.error);
      if (data.type === 'final') final = data;
      const badge = data.badge ?? (data.type === 'final' && data.content);
      if (badge) draft.fields[field] = fieldsOf(badge)[field];
      render();
    }
    if (!final) throw new Problem('The connection was cut while the field was written. Try again.');
    announce(`${FIELDS[field].label} of draft ${draft.number} is written anew.`);
    toast(`${FIELDS[field].label} written anew.`, () => { draft.fields[field] = before; save(draft); render(); });
  } catch (problem) {
    draft.fields[field] = before;
    if (problem.name !== 'AbortError') {
      draft.error = {detail: problem instanceof Problem ? problem.message : 'The connection was cut while the field was written. Try again.', retryAfter: 0};
    }
  } finally {
    rewrites.delete(draft.id);
    save(draft);
    render();
  }
}

async function* eventsIn(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = '';
  for (;;) {
    const {done, value} = await reader.read();
    if (done) return;
    const lines = (rest + value).split('\n');
    rest = lines.pop();
    for (const line of lines) if (line.startsWith('data: ')) yield JSON.parse(line.slice(6));
  }
}

// ---- the form

function readForm() {
  const form = new FormData($('composer'));
  const count = Number(form.get('count'));
  form.delete('count');
  const request = {};
  for (const [name, value] of form) if (value.trim()) request[name] = name in SAMPLING ? Number(value) : value.trim();
  return {request, count};
}

function refuseForm(problem) {
  markInvalid(problem.errors);
  const faults = problem.errors.filter(fault => fault.msg).map(fault => `${labelOf(fault.loc.at(-1))}: ${fault.msg}`);
  state.error = [problem.message, ...faults];
  render();
  const first = $('composer').querySelector('[aria-invalid=true]') ?? (problem.status === 413 ? $('content') : null);
  first?.closest('details')?.setAttribute('open', '');
  first?.focus();
}

const labelOf = name => document.querySelector(`label[for="${CSS.escape(name)}"]`)?.textContent ?? String(name);

function markInvalid(errors) {
  const names = errors.map(fault => fault.loc.at(-1));
  for (const control of $('composer').querySelectorAll('[name]')) {
    if (names.includes(control.name)) control.setAttribute('aria-invalid', 'true');
    else control.removeAttribute('aria-invalid');
  }
}

async function readFile(file) {
  if (!/\.(txt|md|markdown|html?)$/i.test(file.name) && !file.type.startsWith('text/')) {
    return refuseForm(new Problem(`${file.name} is not a text file. Save it as .txt, .md or .html, or copy its text and paste it here.`));
  }
  if (file.size > 2 ** 20) return refuseForm(new Problem(`${file.name} is too large: a megabyte of text is more than the model can read.`));
  setContent(await file.text(), `From ${file.name}`);
}

function setContent(text, source) {
  $('content').value = text;
  $('content').scrollTop = 0;
  $('source').textContent = source;
  state.error = [];
  markInvalid([]);
  formChanged();
}

function formChanged() {
  const {request, count} = readForm();
  const words = $('content').value.trim().split(/\s+/).filter(Boolean).length;
  setText($('words'), words ? plural(words, 'word') : '');
  setText($('write'), `Write ${plural(count, 'draft')}`);
  const told = names => names.map(name => request[name]).filter(value => value !== undefined).join(', ');
  const chosen = told(['badge_style', 'badge_tone', 'criterion_style']) + (request.custom_instructions ? ', with instructions' : '');
  setText($('options-told'), chosen.replace(/^, /, ''));
  setText($('sampling-told'), Object.keys(SAMPLING).some(name => name in request) ? 'changed' : '');
  store.write('form', {values: Object.fromEntries(new FormData($('composer'))), source: $('source').textContent});
  render();
}

function buildForm() {
  for (const [name, choices] of Object.entries(CHOICES)) {
    $(name).append(element('option', {value: '', textContent: 'Not specified'}), ...choices.map(choice => element('option', {textContent: choice})));
  }
  for (const [name, label] of Object.entries(SAMPLING)) {
    const input = element('input', {id: name, name, type: 'number', step: 'any', inputMode: 'decimal', placeholder: 'Default'});
    $('sampling').append(element('div', {}, element('label', {htmlFor: name, textContent: label}), input));
  }
  for (const number of [1, 2, 3, 4]) {
    $('count').append(element('label', {}, element('input', {type: 'radio', name: 'count', value: number, checked: number === 4}), String(number)));
  }
  for (const {title, source, text} of SAMPLES) {
    $('samples').append(element('button', {type: 'button', textContent: title, onclick: () => setContent(text, source)}));
  }
  const kept = store.read('form');
  for (const [name, value] of Object.entries(kept?.values ?? {})) {
    const control = $('composer').elements[name];
    if (control) control.value = value;
  }
  $('source').textContent = kept?.source ?? '';
}

// ---- the drawn badge: from name, level and institution alone

const SVG = 'http://www.w3.org/2000/svg';
const SERIF = "Georgia, 'Times New Roman', 'Liberation Serif', serif";
const SANS = "'Helvetica Neue', Helvetica, Arial, 'Liberation Sans', sans-serif";
const PALETTES = [ // ground, field, metal
  ['#12263f', '#1f4468', '#f0c36d'], ['#14352c', '#24604d', '#e3cd86'], ['#431729', '#742a45', '#f0c2a2'],
  ['#29264f', '#474390', '#cbc6ff'], ['#4a2a0e', '#7d4a1c', '#f6d193'], ['#0b3a47', '#15606f', '#f6d59a'],
  ['#2a2e35', '#4c545f', '#dde3ec'], ['#3a1846', '#65307a', '#f2c6e2'],
];
const polar = (radius, steps) => 'M' + Array.from({length: steps}, (_, step) => {
  const angle = step / steps * 2 * Math.PI - Math.PI / 2;
  return `${(120 + radius(step) * Math.cos(angle)).toFixed(1)} ${(120 + radius(step) * Math.sin(angle)).toFixed(1)}`;
}).join('L') + 'Z';
const SHAPES = {
  '': polar(step => 107 + 4.5 * Math.cos(step / 144 * 24 * 2 * Math.PI), 144), // a seal
  Beginner: polar(() => 109, 120),
  Intermediate: polar(() => 110, 6),
  Advanced: 'M120 8C146 22 180 29 214 28C220 108 200 190 120 232C40 190 20 108 26 28C60 29 94 22 120 8Z',
  Expert: polar(step => step % 2 ? 94 : 113, 24),
};

function svg(tag, attributes = {}, ...children) {
  const made = document.createElementNS(SVG, tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  made.append(...children);
  return made;
}

function hashOf(text) { // FNV-1a
  let hash = 0x811c9dc5;
  for (const character of text) hash = Math.imul(hash ^ character.codePointAt(0), 0x01000193) >>> 0;
  return hash;
}

const pen = document.createElement('canvas').getContext('2d');
function widthOf(text, font) { // at one pixel
  pen.font = font;
  return pen.measureText(text).width / 100;
}

/** The text in lines as large as the box allows; what is too long ends in an ellipsis. */
function fitted(text, font, width, height, largest, smallest) {
  const han = '\\p{Script=Han}|\\p{Script=Hiragana}|\\p{Script=Katakana}|\\p{Script=Thai}';
  const parts = text.match(new RegExp(`(?:${han})|(?:(?!${han})\\S){1,18}\\s*`, 'gu')) ?? [];
  const sizes = parts.map(part => widthOf(part, font));
  const total = sizes.reduce((sum, size) => sum + size, 0), longest = Math.max(...sizes);
  let best = {size: 0, lines: []};
  for (let step = 0; step <= 40; step++) {
    const limit = longest + (total - longest) * step / 40 + .001;
    const lines = [''];
    let used = 0;
    parts.forEach((part, index) => {
      if (used && used + sizes[index] > limit) { lines.push(''); used = 0; }
      lines[lines.length - 1] += part;
      used += sizes[index];
    });
    const trimmed = lines.map(line => line.trim());
    const widest = Math.max(...trimmed.map(line => widthOf(line, font)));
    const size = Math.min(largest, width / widest, height / (trimmed.length * 1.16));
    if (size > best.size + .01) best = {size, lines: trimmed};
  }
  if (best.size >= smallest || parts.length < 2) return best;
  const kept = parts.slice(0, -1).join('').replace(/[\s…]+$/, '');
  // Where the part that went was the ellipsis alone, a character has to go too, or this would never end.
  const shorter = kept.length + 1 < text.length ? kept : [...kept].slice(0, -1).join('');
  return fitted(shorter + '…', font, width, height, largest, smallest);
}

function lettering(text, x, y, size, attributes, font) {
  // textLength keeps the text inside its shape where the font is another one.
  const length = (widthOf(text, font) * size + (attributes['letter-spacing'] ?? 0) * ([...text].length - 1)).toFixed(1);
  const fit = text.length > 1 ? {textLength: length, lengthAdjust: 'spacingAndGlyphs'} : {};
  return svg('text', {x, y: y.toFixed(1), 'font-size': size.toFixed(1), 'text-anchor': 'middle', ...fit, ...attributes}, text);
}

function drawBadge({name, level = '', institution = ''}) {
  const clean = text => text.replace(/[\p{Cc}\p{Cs}\ufffe\uffff]+/gu, ' ').trim();
  [name, institution] = [clean(name), clean(institution)];
  const hash = hashOf([name, level, institution].join('\n'));
  const [ground, field, metal] = PALETTES[hash % PALETTES.length];
  const shape = SHAPES[level] ?? SHAPES[''];
  const inset = scale => ({d: shape, transform: `translate(120 120) scale(${scale}) translate(-120 -120)`, 'stroke-linejoin': 'round'});
  const petals = 9 + (hash >>> 8) % 8, flat = 24 + (hash >>> 16) % 30;
  const rosette = svg('g', {fill: 'none', stroke: metal, 'stroke-width': .7, opacity: .34});
  for (let petal = 0; petal < petals; petal++) {
    rosette.append(svg('ellipse', {cx: 120, cy: 120, rx: 76, ry: flat, transform: `rotate(${(petal * 180 / petals).toFixed(2)} 120 120)`}));
  }
  const drawn = svg('svg', {xmlns: SVG, viewBox: '0 0 240 240', width: 480, height: 480, role: 'img'});
  drawn.setAttribute('aria-label', ['Badge', name, level, institution].filter(Boolean).join(', '));
  drawn.append(
    svg('path', {...inset(1), fill: ground, stroke: ground, 'stroke-width': 8}),
    svg('path', {...inset(.95), fill: 'none', stroke: metal, 'stroke-width': 2.4}),
    svg('path', {...inset(.88), fill: field, stroke: field, 'stroke-width': 6}),
    rosette,
    svg('ellipse', {cx: 120, cy: 118, rx: 80, ry: 46, fill: field, opacity: .82}),
  );
  const pips = Object.keys(SHAPES).indexOf(level);
  for (let pip = 0; pip < pips; pip++) {
    const x = 120 + (pip - (pips - 1) / 2) * 15;
    drawn.append(svg('path', {d: `M${x} 42l2 4.600 5 .5-3.800 3.300 1.100 4.900-4.300-2.600-4.300 2.600 1.100-4.900-3.800-3.300 5-.5z`, fill: metal}));
  }
  if (pips > 0) drawn.append(lettering(level.toUpperCase(), 120, 70, 9.5, {fill: metal, 'font-family': SANS, 'font-weight': 700, 'letter-spacing': 1.6}, `700 100px ${SANS}`));
  const font = `700 100px ${SERIF}`;
  const {size, lines} = fitted(name, font, {Advanced: 136, Expert: 142}[level] ?? 152, 84, 30, 10.5);
  lines.forEach((line, index) => {
    const y = 118 + (index - (lines.length - 1) / 2) * size * 1.16 + size * .34;
    drawn.append(lettering(line, 120, y, size, {fill: '#fff', 'font-family': SERIF, 'font-weight': 700}, font));
  });
  if (institution) {
    const ribbon = fitted(institution, `600 100px ${SANS}`, 150, 16, 13, 8.5);
    const one = ribbon.lines.length > 1 ? fitted(ribbon.lines[0] + '…', `600 100px ${SANS}`, 150, 12, 11, 5) : ribbon;
    drawn.append(
      svg('path', {d: 'M14 180l26 0 0 28-26 0 9-14zM226 180l-26 0 0 28 26 0-9-14z', fill: metal}),
      svg('path', {d: 'M40 208l-10-6 10 0zM200 208l10-6-10 0z', fill: ground}),
      svg('path', {d: 'M30 174H210V202H30Z', fill: metal, stroke: ground, 'stroke-width': 1.5}),
      lettering(one.lines[0], 120, 188 + one.size * .36, one.size, {fill: ground, 'font-family': SANS, 'font-weight': 600}, `600 100px ${SANS}`),
    );
  } else if (!pips) {
    drawn.append(svg('path', {d: 'M120 178l4 9 9 4-9 4-4 9-4-9-9-4 9-4z', fill: metal}));
  }
  return drawn;
}

function drawGhost(level = '') {
  const path = svg('path', {d: SHAPES[level] ?? SHAPES[''], fill: 'none', stroke: 'currentColor', 'stroke-width': 2, 'stroke-dasharray': '5 6', opacity: .6});
  const ghost = svg('svg', {viewBox: '0 0 240 240', 'aria-hidden': 'true'}, path);
  ghost.classList.add('ghost');
  return ghost;
}

const artOf = draft => ({name: draft.fields.name, level: requestOf(draft).badge_level, institution: requestOf(draft).institution});
const svgText = draft => new XMLSerializer().serializeToString(drawBadge(artOf(draft)));
const base64 = text => btoa(Array.from(new TextEncoder().encode(text), byte => String.fromCharCode(byte)).join(''));
const fileName = (draft, extension) => `${draft.fields.name.toLowerCase().replace(/[^\p{L}\p{N}]+/gu, '-').replace(/^-+|-+$/g, '').slice(0, 60) || 'badge'}.${extension}`;

async function pngOf(draft) {
  const image = new Image(1024, 1024);
  image.src = `data:image/svg+xml;base64,${base64(svgText(draft))}`;
  await image.decode();
  const canvas = element('canvas', {width: 1024, height: 1024});
  canvas.getContext('2d').drawImage(image, 0, 0, 1024, 1024);
  return new Promise(resolve => canvas.toBlob(resolve, 'image/png'));
}

function download(blob, name) {
  const url = URL.createObjectURL(blob);
  element('a', {href: url, download: name}).click();
  setTimeout(() => URL.revokeObjectURL(url), 60000);
}

async function copy(text) {
  try {
    await navigator.clipboard.writeText(text);
  } catch { // there is no clipboard for pages over plain HTTP
    const holder = element('textarea', {value: text});
    const focused = document.activeElement;
    (document.querySelector('dialog[open]') ?? document.body).append(holder);
    holder.select();
    document.execCommand('copy');
    holder.remove();
    focused?.focus();
  }
  toast('Copied.');
}

// ---- export

let exporting; // the draft in the dialog
let built = 0; // counts previews: only the last asked for is shown

function openExport(draft) {
  exporting = draft;
  const request = requestOf(draft), issuer = store.read('issuer') ?? {};
  $('issuer-name').value = issuer.name ?? request.institution ?? '';
  $('issuer-id').value = issuer.id ?? request.institute_url ?? '';
  $('export-title').textContent = `Export “${draft.fields.name}”`;
  $('export-error').textContent = '';
  $('preview').textContent = '';
  $('export').showModal();
  preview();
}

const exportFormat = () => new FormData($('export').querySelector('form')).get('format');

async function exported() {
  const format = exportFormat(), draft = exporting;
  const badge = badgeOf(draft);
  if (format === 'badge') return badge;
  const {name, description, criteria} = draft.fields;
  const achievement = draft.achievement && {...draft.achievement, name, description, criteria: {narrative: criteria}};
  const issuer = format === 'credential' ? {id: $('issuer-id').value.trim(), name: $('issuer-name').value.trim()} : {id: 'did:example:issuer', name: 'Issuer'};
  if (!issuer.id || !issuer.name) throw new Problem('Name the issuer and its URL or DID: a credential says who awards it.', {code: 'no_issuer'});
  const image = $('export').querySelector('[name=image]').checked ? `data:image/svg+xml;base64,${base64(svgText(draft))}` : undefined;
  const recipient = format === 'credential' && $('recipient').value.trim() || undefined;
  const body = {...(achievement ? {achievement} : {badge}), issuer, image, recipient_id: recipient};
  const credential = await (await api('credentials', {method: 'POST', body})).json();
  if (format === 'credential') {
    store.write('issuer', issuer);
    return credential;
  }
  return {'@context': credential['@context'], ...credential.credentialSubject.achievement};
}

/** Build what is chosen and show it; null with the fault shown when it cannot be built. */
async function preview(isFinal = false) {
  const number = ++built, format = exportFormat();
  $('issuer-fields').hidden = format !== 'credential';
  $('image-choice').hidden = format === 'badge';
  try {
    const made = await exported();
    if (number !== built) return null;
    $('export-error').textContent = '';
    for (const input of $('issuer-fields').querySelectorAll('input')) input.removeAttribute('aria-invalid');
    const text = JSON.stringify(made, null, 2);
    $('preview').textContent = text.replace(/(base64,.{40})[A-Za-z0-9+/=]+/, '$1…');
    return text;
  } catch (problem) {
    if (number !== built) return null;
    $('preview').textContent = problem.code === 'no_issuer' ? 'The credential is shown here once the issuer is named.' : '';
    if (problem.code !== 'no_issuer' || isFinal) showExportFault(problem, isFinal);
    return null;
  }
}

function showExportFault(problem, isFinal) {
  const controls = {'issuer.id': 'issuer-id', 'issuer.name': 'issuer-name', 'recipient_id': 'recipient'};
  const faults = (problem.errors ?? []).map(({loc, msg}) => ({control: controls[loc.join('.')], where: loc.join(' '), msg}));
  const text = faults.map(({control, where, msg}) => `${control ? labelOf(control) : where}: ${msg}.`).join(' ');
  $('export-error').textContent = text || problem.message;
  const wrong = problem.code === 'no_issuer' ? ['issuer-name', 'issuer-id'].filter(id => !$(id).value.trim()) : faults.map(fault => fault.control).filter(Boolean);
  wrong.forEach(id => $(id).setAttribute('aria-invalid', 'true'));
  if (isFinal && wrong.length) $(wrong[0]).focus();
}

async function takeExport(action) {
  const text = await preview(true);
  if (text !== null) action(text, fileName(exporting, exportFormat() === 'badge' ? 'json' : `${exportFormat()}.json`));
}

// ---- health

let healthTimer;
async function checkHealth() {
  clearTimeout(healthTimer);
  if (document.hidden) return;
  const key = storedKey();
  try {
    const response = await fetch(new URL('health', BASE), {headers: key ? {Authorization: `Bearer ${key}`} : {}, cache: 'no-store'});
    state.health = response.status === 401 ? {locked: true} : await response.json();
  } catch {
    state.health = {unreachable: true};
  }
  renderHealth();
  healthTimer = setTimeout(checkHealth, state.health.unreachable || state.drafts.some(isLive) ? 3000 : 15000);
}

const checkHealthSoon = debounced(400, () => checkHealth());
const engineName = {ollama: 'Ollama', openai: 'OpenAI API', embedded: 'built in'};

function renderHealth() {
  const {status, error, locked, unreachable, engine, target_model: model, active_requests: active, queued_requests: queued, queue_status: queue} = state.health;
  const told = unreachable ? ['bad', 'No connection to the service'] : locked ? ['warn', 'A key is needed'] : status === 'unhealthy' ? ['bad', error]
    : queue === 'full' ? ['warn', 'Queue full'] : ['good', queue === 'busy' ? 'Busy' : 'Ready'];
  const parts = [element('span', {className: `dot ${told[0]}`}, element('b', {textContent: told[1]}))];
  if (locked) parts.push(element('button', {className: 'text', type: 'button', textContent: 'Enter the key', onclick: () => askForKey(storedKey())}));
  if (model && !locked && !unreachable) {
    parts.push(element('span', {textContent: model}), element('span', {textContent: `Engine: ${engineName[engine] ?? engine}`}));
    parts.push(element('span', {textContent: `${active} writing, ${queued} waiting`}));
  }
  if (state.protocol) parts.push(element('span', {id: 'protocol', title: 'Protocol between this page and the service', textContent: state.protocol}));
  if (document.activeElement?.closest('#health') && locked) return;
  $('health').replaceChildren(...parts);
}

function watchProtocol() {
  const names = {h2: 'h2', h3: 'h3', 'http/1.1': 'HTTP/1.1', 'http/1.0': 'HTTP/1.0'};
  const take = entries => {
    const last = entries.filter(entry => entry.nextHopProtocol && entry.name.startsWith(BASE.origin)).at(-1)?.nextHopProtocol;
    if (!last || state.protocol === (names[last] ?? last)) return;
    state.protocol = names[last] ?? last;
    $('protocol-note').hidden = !last.startsWith('http/1');
    renderHealth();
  };
  take(performance.getEntriesByType('navigation'));
  new PerformanceObserver(list => take(list.getEntries())).observe({type: 'resource', buffered: true});
}

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
    svg: () => download(new Blob([svgText(draft)], {type: 'image/svg+xml'}), fileName(draft, 'svg')),
    png: async () => download(await pngOf(draft), fileName(draft, 'png')),
    remove: () => removeDrafts([draft], `Draft ${draft.number} removed.`),
  };
  for (const button of root.querySelectorAll('[data-do]')) {
    const name = button.dataset.do;
    card.act[name] = button;
    button.onclick = actions[name];
    button.append(of({svg: 'image of ', png: 'image of '}[name] ?? ''));
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
  act.svg.disabled = act.png.disabled = isLive(draft) || !draft.fields.name.trim();
  if (focused === act.stop && act.stop.hidden) (act.export.disabled ? act.again : act.export).focus();
}

function drawArt(draft, card) {
  // Drawn once the name stands: it would be redrawn with every token of it otherwise.
  const ready = draft.fields.name.trim() && (!isLive(draft) || draft.fields.description) && rewrites.get(draft.id)?.field !== 'name';
  const art = artOf(draft), key = ready ? JSON.stringify(art) : 'ghost';
  if (card.drawn === key || (card.drawn && !ready && rewrites.has(draft.id))) return;
  const drawn = ready ? drawBadge(art) : drawGhost(art.level);
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

// ---- events of the page

function takeDrops() {
  const form = $('composer');
  const carriesFiles = event => [...event.dataTransfer?.types ?? []].includes('Files');
  addEventListener('dragover', event => { if (carriesFiles(event)) { event.preventDefault(); form.classList.add('dropping'); } });
  addEventListener('dragleave', event => { if (!event.relatedTarget) form.classList.remove('dropping'); });
  addEventListener('drop', event => {
    form.classList.remove('dropping');
    if (!carriesFiles(event)) return;
    event.preventDefault();
    if (event.dataTransfer.files[0]) readFile(event.dataTransfer.files[0]);
  });
}

function listen() {
  $('composer').addEventListener('submit', event => { event.preventDefault(); writeDrafts(); });
  $('composer').addEventListener('input', event => {
    if (event.target === $('content')) $('source').textContent = '';
    event.target.removeAttribute('aria-invalid');
    formChanged();
  });
  $('composer').addEventListener('keydown', event => { if (event.key === 'Enter' && (event.ctrlKey || event.metaKey)) writeDrafts(); });
  $('open').onclick = () => $('file').click();
  $('file').onchange = () => { if ($('file').files[0]) readFile($('file').files[0]); $('file').value = ''; };
  $('stop-all').onclick = () => { state.drafts.filter(isBusy).forEach(stop); $('drafts-title').focus(); };
  $('clear').onclick = () => removeDrafts([...state.drafts], 'Drafts cleared.');
  $('undo').onclick = () => { undoAction?.(); hideToast(); };
  $('change-key').onclick = () => askForKey(storedKey());
  $('forget').onclick = () => {
    if (!confirm('Forget the drafts, the catalogue, the course text, the issuer and the key that this browser keeps for this page?')) return;
    [...state.drafts].forEach(dropDraft);
    store.names('').forEach(name => store.write(name, null));
    store.write('key', null, sessionStorage);
    $('composer').reset();
    setContent('', '');
    store.write('form', null);
    document.dispatchEvent(new Event('forget')); // the catalogue is kept elsewhere
    toast('Everything is forgotten.');
  };
  $('export').addEventListener('input', debounced(250, () => preview()));
  $('export-copy').onclick = () => takeExport(copy);
  $('export').addEventListener('submit', event => {
    event.preventDefault();
    takeExport((text, name) => download(new Blob([text], {type: 'application/json'}), name));
  });
  for (const button of document.querySelectorAll('[data-close]')) button.onclick = () => button.closest('dialog').close();
  $('cards').addEventListener('focusout', () => setTimeout(render));
  document.addEventListener('visibilitychange', () => { if (!document.hidden) checkHealth(); });
  addEventListener('pagehide', () => state.drafts.forEach(save));
  setInterval(() => { if (state.drafts.some(isLive)) render(); }, 250);
}

buildForm();
$('empty-art').append(drawBadge({name: 'Your first badge', level: 'Advanced'}));
loadDrafts();
listen();
takeDrops();
formChanged();
watchProtocol();
checkHealth();
