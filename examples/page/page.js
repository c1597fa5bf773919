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
  return {id: uid(), batch, number, created: state.batches[batch].created, seed, art: store.read('design') ?? undefined, ...blank()};
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

// ---- events of the page

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
    if (!confirm('Forget the drafts, the course text, the issuer and the key that this browser keeps for this page?')) return;
    [...state.drafts].forEach(dropDraft);
    store.names('').forEach(name => store.write(name, null));
    store.write('key', null, sessionStorage);
    $('composer').reset();
    setContent('', '');
    store.write('form', null);
    toast('Everything is forgotten.');
  };
  listenToExport();
  for (const button of document.querySelectorAll('[data-close]')) button.onclick = () => button.closest('dialog').close();
  $('cards').addEventListener('focusout', () => setTimeout(render));
  document.addEventListener('visibilitychange', () => { if (!document.hidden) checkHealth(); });
  addEventListener('pagehide', () => state.drafts.forEach(save));
  setInterval(() => { if (state.drafts.some(isLive)) render(); }, 250);
}

buildForm();
buildDesign();
$('empty-art').append(drawBadge({name: 'Your first badge', level: 'Advanced'}));
loadDrafts();
listen();
takeDrops();
formChanged();
watchProtocol();
checkHealth();
