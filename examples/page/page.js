'use strict';

const BASE = new URL('.', location.href);
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
// What a number may be, in the words of its label.
const SAMPLING = {
  temperature: {label: 'Temperature', least: 0, most: 2}, top_p: {label: 'Top p', least: 0, most: 1},
  top_k: {label: 'Top k', least: 1, most: 100, isWhole: true}, repeat_penalty: {label: 'Repeat penalty', least: 0, most: 2},
  longest: {label: 'Longest draft, in words', least: 20, most: 2000, isWhole: true}, seed: {label: 'Seed', isWhole: true},
};
const LANGUAGES = { // of the badge, each by its own name
  en: 'English', ar: 'العربية', bg: 'Български', ca: 'Català', cs: 'Čeština', cy: 'Cymraeg', da: 'Dansk', de: 'Deutsch', el: 'Ελληνικά',
  es: 'Español', et: 'Eesti', fa: 'فارسی', fi: 'Suomi', fr: 'Français', ga: 'Gaeilge', he: 'עברית', hi: 'हिन्दी', hr: 'Hrvatski',
  hu: 'Magyar', id: 'Bahasa Indonesia', it: 'Italiano', ja: '日本語', ko: '한국어', lt: 'Lietuvių', lv: 'Latviešu', nb: 'Norsk bokmål',
  nl: 'Nederlands', pl: 'Polski', pt: 'Português', ro: 'Română', ru: 'Русский', sk: 'Slovenčina', sl: 'Slovenščina', sr: 'Српски',
  sv: 'Svenska', sw: 'Kiswahili', ta: 'தமிழ்', th: 'ไทย', tr: 'Türkçe', uk: 'Українська', ur: 'اردو', vi: 'Tiếng Việt', zh: '中文',
};
// The drafts of a course differ on purpose. The first is written as the service writes without further words.
const EMPHASES = [
  {name: 'Balanced', warmer: 0},
  {name: 'Skills and tools', warmer: .2, words: 'Put the skills that learners show, and the tools and methods that the course names, first. Name the badge after the main skill.'},
  {name: 'What was done', warmer: .3, words: 'Put what learners do and hand in during the course first: exercises, projects, tests. Name the badge after what learners do.'},
  {name: 'Use afterwards', warmer: .4, words: 'Put what learners can do with it afterwards first, as far as the course says so. Name the badge after the field of work or study.'},
];
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
const state = {drafts: [], batches: {}, health: {}, protocol: '', error: [], loaded: false, unkept: ''};
const cards = new Map(); // draft id: its elements
const sources = new Map(); // draft id: EventSource
const rewrites = new Map(); // draft id: {field, controller}


// ---- the service

class Problem extends Error {
  constructor(detail, {status = 0, code = '', errors = [], retryAfter = 0, fits = 0} = {}) {
    super(detail);
    Object.assign(this, {status, code, errors, retryAfter, fits});
  }
}

async function problemIn(response) {
  const body = await response.json().catch(() => ({}));
  const detail = body.detail || `The service answered ${response.status}. Try again in a moment.`;
  const retryAfter = Number(response.headers.get('Retry-After')) || 0;
  return new Problem(detail, {status: response.status, code: body.error_code, errors: body.errors, retryAfter, fits: body.content_words_that_fit});
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
    const ignored = response.headers.get('X-Ignored-Fields');
    if (ignored) console.info(`The service does not know and has ignored: ${ignored}`);
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
  return {id: uid(), batch, number, created: state.batches[batch].created, seed, emphasis: number - 1, favourite: false, art: store.read('design') ?? undefined, ...blank()};
}

function blank() {
  return {
    state: 'sending', run: uid(), owner: TAB, generation: null, position: 0, wait: 0, waitSince: 0, queuedAt: 0, tokens: 0, started: 0, firstToken: 0, seconds: 0,
    fields: {name: '', description: '', criteria: ''}, achievement: null, review: null, accepted: [], finish: '', error: null,
    lost: false, lostSince: 0, stopping: false, bare: false, before: null,
  };
}

/** What is asked of the service for a draft: the form's request with the draft's emphasis. */
function bodyOf(draft) {
  const {words, warmer} = EMPHASES[draft.emphasis] ?? EMPHASES[0], request = requestOf(draft);
  const body = {...request, seed: draft.seed};
  if (words) body.custom_instructions = [request.custom_instructions, words].filter(Boolean).join('\n');
  if (warmer && request.temperature === undefined) body.temperature = .2 + warmer;
  return body;
}

async function writeDrafts() {
  state.error = [];
  completeUrls();
  const {request, count} = readForm(), faults = faultsOfForm();
  if (!request.content) return refuseForm(new Problem('Paste a course description first, or take a sample.', {errors: [{loc: ['content'], msg: ''}]}));
  if (faults.length) return refuseForm(new Problem('', {errors: faults}));
  markInvalid([]);
  const {seed = randomSeed(), ...shared} = request;
  const batch = uid();
  state.batches[batch] = {request: shared, created: Date.now(), title: courseTitle(shared.content)};
  const drafts = Array.from({length: count}, (_, index) => newDraft(batch, index + 1, seed + index));
  state.drafts = [...drafts, ...state.drafts];
  foldOld();
  draw();
  if ($('drafts-title').getBoundingClientRect().top > innerHeight * .7) $('drafts-title').scrollIntoView({behavior: 'smooth'});
  // The first one tells whether the request is in order; four equal complaints would help nobody.
  const problem = await send(drafts[0]);
  if (problem && ([400, 401, 413, 422].includes(problem.status) || problem.code === 'unreachable')) {
    drafts.forEach(dropDraft);
    return refuseForm(problem);
  }
  announce(`Writing ${plural(count, 'draft')}.`);
  for (const draft of drafts.slice(1)) { // one after another, so that they wait in the order of their numbers
    if (draft.state === 'sending' && state.drafts.includes(draft)) await send(draft);
  }
}

/** The course's first line that says something, as the heading of its drafts. */
function courseTitle(content) {
  const plain = content.slice(0, 5000).replace(/<(script|style|head)\b[\s\S]*?<\/\1>|<!--[\s\S]*?-->|<[^>]*>/gi, '\n').replace(/^[\s#>*=-]+/gm, '');
  const line = plain.split('\n').map(line => line.replace(/[*_`]{2,}/g, '').trim()).find(line => /[\p{L}\p{N}]/u.test(line)) ?? 'Course';
  if (line.length <= 80) return line;
  const [, sentence] = /^(.{8,80}?(?:\p{L}{3}|\b[IVX]+|[\p{N})”"]))(?:[.!?](?=\s)|[。！？])/u.exec(line) ?? [];
  return sentence ?? `${line.slice(0, 80).replace(/\s+\S*$/, '')}…`;
}

/** Ask for a generation. The key makes a repetition, after a reload or a cut, find the same one again. */
async function send(draft) {
  const run = draft.run;
  draft.owner = TAB;
  save(draft);
  render();
  try {
    const body = bodyOf(draft);
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

function unfollow(id) {
  sources.get(id)?.close();
  sources.delete(id);
}

/** Show a generation's events as they come; the EventSource resumes by itself after a cut. */
function follow(draft) {
  unfollow(draft.id);
  if (draft.owner !== TAB) {
    draft.owner = TAB;
    save(draft);
  }
  const source = new EventSource(new URL(`generations/${draft.generation}/events?partial=true&accumulated=false`, BASE));
  sources.set(draft.id, source);
  const on = (name, handle) => source.addEventListener(name, event => {
    const data = JSON.parse(event.data);
    // An id tells how many tokens its reader has; the last event's counts itself.
    if (data.type !== 'final' && data.type !== 'error') draft.tokens = Number(event.lastEventId.split('.').pop());
    draft.lost = false;
    handle(data);
    if (isLive(draft)) tellSoon(draft);
    render();
  });
  on('queue', data => {
    Object.assign(draft, {position: data.position, wait: data.estimated_wait, waitSince: Date.now(), state: data.position ? 'queued' : 'writing'});
    if (data.position) draft.queuedAt ||= Date.now();
    else draft.started ||= Date.now();
  });
  on('partial', data => {
    draft.fields = fieldsOf(data.badge);
  });
  on('message', data => {
    if (data.type === 'token' && !draft.firstToken) {
      draft.firstToken = Date.now();
      if (draft.started) learnPace({reading: (draft.firstToken - draft.started) / 1000});
      save(draft);
    }
    if (data.type === 'final') finish(draft, data);
    if (data.type === 'error') fail(draft, new Problem(data.error, {code: data.error_code}));
  });
  source.onopen = () => { draft.lost = false; render(); };
  source.onerror = () => {
    if (!draft.lost) Object.assign(draft, {lost: true, lostSince: Date.now()});
    checkHealthSoon();
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

/** With a word in each part: a draft that was stopped lacks some, and one of them can be written anew all the same. */
function wholeBadgeOf(draft) {
  const text = name => draft.fields[name].trim() || 'Not written yet.';
  return {badge_name: text('name').slice(0, 120), badge_description: text('description'), criteria: {narrative: text('criteria')}};
}

function end(draft, outcome) {
  unfollow(draft.id);
  const seconds = draft.started ? (Date.now() - draft.started) / 1000 : 0;
  Object.assign(draft, {seconds, rate: rateOf(draft), lost: false, stopping: false, ...outcome});
  save(draft);
  render();
  checkHealthSoon();
}

function finish(draft, final) {
  const {before} = draft;
  draft.tokens = final.usage.completion_tokens;
  learnPace({tokens: draft.tokens, rate: rateOf(draft)});
  end(draft, {state: 'done', review: final.review ?? null, accepted: [], fields: fieldsOf(final.content), achievement: final.achievement, finish: final.finish_reason, error: null, before: null});
  if (before) toast(`Draft ${draft.number} is written again.`, () => putBack(draft, before));
  announce(`Draft ${draft.number} is written: ${draft.fields.name}`);
}

function fail(draft, problem) {
  const stopped = problem.code === 'cancelled';
  const bare = !hasText(draft), {before} = draft;
  const error = stopped ? null : {detail: problem.message, retryAfter: problem.retryAfter, code: problem.code};
  if (before && (bare || !stopped)) putBack(draft, before, error); // a try that came to nothing costs nothing
  else {
    end(draft, {state: stopped ? 'stopped' : 'failed', bare, error, before: null});
    if (before) toast(`Draft ${draft.number} is stopped. Undo brings back what it was before.`, () => putBack(draft, before));
  }
  if (!stopped) announce(`Draft ${draft.number} failed. ${problem.message}`);
}

async function stop(draft) {
  rewrites.get(draft.id)?.controller.abort();
  if (!isLive(draft)) return;
  draft.stopping = true;
  render();
  if (!draft.generation) return; // `send` comes back here when there is something to stop
  if (!sources.has(draft.id) && !isElsewhere(draft)) follow(draft);
  try {
    await api(`generations/${draft.generation}`, {method: 'DELETE'});
  } catch (problem) {
    draft.stopping = false;
    if (problem.status === 404) lookUp(draft);
    else if (problem.code === 'unreachable' && draft.lost) fail(draft, new Problem('', {code: 'cancelled'}));
    else toast(problem.message);
    render();
  }
}

/** Write a draft anew. What it was stays with it until the new one is there. */
function again(draft) {
  const {before: _, art: _art, favourite: _favourite, ...before} = structuredClone(draft);
  Object.assign(draft, blank(), {seed: randomSeed(), before: hasText(draft) ? before : null});
  send(draft);
  draw(); // now, or there is no Stop yet to take the focus
  cards.get(draft.id).act.stop.focus();
  if (draft.before) toast(`Draft ${draft.number} is being written again.`, () => putBack(draft, before));
}

function putBack(draft, before, error = before.error) {
  if (isLive(draft)) stop(draft);
  unfollow(draft.id);
  Object.assign(draft, structuredClone(before), {error, before: null, lost: false, stopping: false});
  save(draft);
  render();
}

/** Write one field anew to suit the rest. */
async function rewrite(draft, field) {
  const before = draft.fields[field], review = draft.review;
  const controller = new AbortController();
  rewrites.set(draft.id, {field, controller});
  draft.error = null;
  draw();
  cards.get(draft.id).act.stop.focus();
  try {
    const body = {...bodyOf(draft), seed: randomSeed(), badge: wholeBadgeOf(draft), field: FIELDS[field].key};
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
    if (final) draft.review = final.review ?? null;
    if (!final) throw new Problem('The connection was cut while the field was written. Try again.');
    announce(`${FIELDS[field].label} of draft ${draft.number} is written anew.`);
    toast(`${FIELDS[field].label} written anew.`, () => {
      draft.fields[field] = before;
      draft.review = review;
      save(draft);
      render();
    });
  } catch (problem) {
    draft.fields[field] = before;
    if (problem.name !== 'AbortError') {
      draft.error = {detail: problem instanceof Problem ? problem.message : 'The connection was cut while the field was written. Try again.', retryAfter: 0, code: problem.code};
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
  if (request.longest) request.max_tokens = Math.min(4096, Math.ceil(request.longest) * 2 + 60); // two for a word, in most languages fewer
  delete request.longest;
  return {request, count};
}

/** What the page can tell by itself, in the words of its labels. */
function faultsOfForm() {
  const faults = [];
  for (const [name, {least = 0, most = 2 ** 53, isWhole}] of Object.entries(SAMPLING)) {
    const control = $(name), value = Number(control.value);
    if (!control.value && !control.validity.badInput) continue;
    const fits = !control.validity.badInput && value >= least && value <= most && (!isWhole || Number.isInteger(value));
    const range = most < 2 ** 53 ? `${least} to ${most}` : `${least} up`;
    if (!fits) faults.push({loc: [name], msg: `write a ${isWhole ? 'whole ' : ''}number from ${range}.`});
  }
  const url = $('institute_url').value.trim();
  if (url && !/^https?:\/\/[^\s"<>\\^`{|}]+$/.test(url)) faults.push({loc: ['institute_url'], msg: 'write a web address, for example https://example.edu.'});
  return faults;
}

function refuseForm(problem) {
  const errors = problem.errors ?? [];
  markInvalid(errors);
  const faults = errors.filter(fault => fault.msg).map(fault => `${labelOf(fault.loc.at(-1))}: ${wordsOf(fault)}`);
  const fits = problem.fits || (problem.code === 'body_too_large' && state.health.content_words_that_fit);
  const tooLong = fits ? `The course description is too long for this model, which reads about ${fits.toLocaleString('en')} words. Shorten it, or take a part of it.` : '';
  state.isUnreached = problem.code === 'unreachable';
  if (state.isUnreached) checkHealth();
  state.error = faults.length ? faults : [tooLong || problem.message];
  render();
  const first = $('composer').querySelector('[aria-invalid=true]') ?? (problem.status === 413 ? $('content') : null);
  first?.closest('details')?.setAttribute('open', '');
  first?.focus();
}

/** A fault as the service words it, without the field's name in front, which the label says. */
function wordsOf({loc, msg}) {
  const words = msg.replace(new RegExp(`^${loc.map(String).join('\\.')}:\\s*`), '').trim();
  return /[.!?]$/.test(words) ? words : `${words}.`;
}

const controlOf = name => ({max_tokens: 'longest', course_input: 'content'})[name] ?? String(name);
const labelOf = name => document.querySelector(`label[for="${CSS.escape(controlOf(name))}"]`)?.textContent ?? String(name);

function markInvalid(errors) {
  const names = errors.map(fault => controlOf(fault.loc.at(-1)));
  for (const control of $('composer').querySelectorAll('[name]')) {
    if (names.includes(control.name)) control.setAttribute('aria-invalid', 'true');
    else control.removeAttribute('aria-invalid');
  }
}

/** `example.edu` is meant as https://example.edu, and a name with ä or 大 in it as the one that is asked for (IDNA). */
function completedUrl(text) {
  const typed = text.trim(), isBare = /^(?!\w+:)[\p{L}\p{N}-]+(\.[\p{L}\p{N}-]+)+(:\d+)?([/?#]\S*)?$/u.test(typed);
  const whole = isBare ? `https://${typed}` : typed;
  if (!/^https?:\/*[^\s/]\S*$/i.test(whole) || /^https?:\/\/[\x21-\x7e]+$/.test(whole) || !URL.canParse(whole)) return whole;
  const {href} = new URL(whole);
  return whole.endsWith('/') ? href : href.replace(/\/$/, '');
}

function completeUrls() {
  $('institute_url').value = completedUrl($('institute_url').value);
}

function formChanged() {
  const {request, count} = readForm();
  showLength();
  setText($('write'), `Write ${plural(count, 'draft')}`);
  const told = names => names.map(name => request[name]).filter(value => value !== undefined).join(', ');
  const chosen = told(['badge_style', 'badge_tone', 'criterion_style']) + (request.custom_instructions ? ', with instructions' : '');
  setText($('options-told'), chosen.replace(/^, /, ''));
  setText($('sampling-told'), Object.keys(SAMPLING).some(name => $(name).value) ? 'changed' : '');
  store.write('form', {values: Object.fromEntries(new FormData($('composer')))});
  render();
}

function buildForm() {
  for (const [name, choices] of Object.entries(CHOICES)) {
    $(name).append(element('option', {value: '', textContent: 'Not specified'}), ...choices.map(choice => element('option', {textContent: choice})));
  }
  $('language').append(element('option', {value: '', textContent: 'As the course'}));
  for (const [tag, name] of Object.entries(LANGUAGES)) $('language').append(element('option', {value: tag, lang: tag, textContent: name}));
  for (const [name, {label}] of Object.entries(SAMPLING)) {
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
    if (name === 'content') fillContent(value);
    else if (control) control.value = value;
  }
  keptCourse();
}

// ---- health

let healthTimer;
async function checkHealth() {
  clearTimeout(healthTimer);
  if (document.hidden) return;
  const key = storedKey(), wasUnreachable = state.health.unreachable;
  try {
    const response = await fetch(new URL('health', BASE), {headers: key ? {Authorization: `Bearer ${key}`} : {}, cache: 'no-store', signal: AbortSignal.timeout(10000)});
    state.health = response.status === 401 ? {locked: true} : await response.json();
  } catch {
    state.health = {unreachable: true};
  }
  if (wasUnreachable && !state.health.unreachable) forgetUnreached();
  renderHealth();
  healthTimer = setTimeout(checkHealth, state.health.unreachable || state.drafts.some(isLive) ? 3000 : 15000);
}

/** The service answers again: what says that it does not goes away. */
function forgetUnreached() {
  if (state.isUnreached) state.error = [];
  state.isUnreached = false;
  for (const draft of state.drafts.filter(draft => draft.error?.code === 'unreachable' && hasText(draft))) {
    draft.error = null;
    save(draft);
  }
}

const checkHealthSoon = debounced(400, () => checkHealth());
const ENGINES = {ollama: 'Ollama', openai: 'OpenAI API', embedded: 'built in'};

function renderHealth() {
  showLength();
  const {status, error, locked, unreachable, active_requests: active, queued_requests: queued, queue_status: queue} = state.health;
  const told = unreachable ? ['bad', 'The service does not answer'] : locked ? ['warn', 'A key is needed'] : status === 'unhealthy' ? ['bad', error]
    : queue === 'full' ? ['warn', 'Queue full'] : ['good', queue === 'busy' ? 'Busy' : 'Ready'];
  const parts = [element('span', {className: `dot ${told[0]}`}, element('b', {textContent: told[1]}))];
  if (locked) parts.push(element('button', {className: 'text', type: 'button', textContent: 'Enter the key', onclick: () => askForKey(storedKey())}));
  if (!locked && !unreachable && active + queued > 0) parts.push(element('span', {textContent: `${active} writing, ${queued} waiting`}));
  renderService();
  $('model-note').hidden = !isPractice(state.health);
  render();
  if (document.activeElement?.closest('#health') && locked) return;
  $('health').replaceChildren(...parts);
}

/** What an operator wants to know, and nobody else. */
function renderService() {
  const {engine, target_model: model, active_requests: active, queued_requests: queued, version} = state.health;
  const lines = {
    Model: model, Engine: ENGINES[engine] ?? engine, Drafts: active === undefined ? '' : `${active} writing, ${queued} waiting`,
    Protocol: state.protocol, Version: version,
  };
  const shown = Object.entries(lines).filter(([, text]) => text);
  const parts = shown.map(([name, text]) => element('div', {}, element('dt', {textContent: name}), element('dd', {id: `service-${name.toLowerCase()}`, textContent: text})));
  $('service-lines').replaceChildren(...parts);
}

/** Whether the model is one of under a billion parameters that runs in the service itself: good to try the page with. */
function isPractice({engine, target_model: model = ''}) {
  const [, size, unit] = model.match(/(?:^|[^\d.])(\d+(?:\.\d+)?)\s?([mb])(?![a-z])/i) ?? [];
  return engine === 'embedded' && Boolean(size) && (unit.toLowerCase() === 'm' || Number(size) < 1);
}

// ---- how long a draft takes: learnt from the drafts before it, of this model

const paceOf = () => store.read('pace')?.[state.health.target_model] ?? {};

function learnPace(seen) {
  const pace = paceOf();
  for (const [name, value] of Object.entries(seen)) if (value > 0) pace[name] = pace[name] ? pace[name] * .6 + value * .4 : value;
  store.write('pace', {[state.health.target_model]: pace});
}

/** Seconds until a draft is written, or undefined while nothing tells. */
function secondsLeft(draft, now) {
  const {tokens: usual = 220, rate: usualRate, reading} = paceOf();
  if (!draft.firstToken) return usualRate && reading ? Math.max(0, reading - (now - draft.started) / 1000) + usual / usualRate : undefined;
  const rate = draft.tokens > 8 ? rateOf(draft, now) : usualRate;
  return rate ? Math.max(0, usual - draft.tokens) / rate : undefined;
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
    if (event.target === $('content')) courseEdited();
    event.target.removeAttribute('aria-invalid');
    formChanged();
  });
  $('composer').addEventListener('keydown', event => { if (event.key === 'Enter' && (event.ctrlKey || event.metaKey)) writeDrafts(); });
  listenToDocuments();
  $('stop-all').onclick = () => { state.drafts.filter(isBusy).forEach(stop); $('drafts-title').focus(); };
  $('clear').onclick = () => removeDrafts([...state.drafts], 'All drafts removed.');
  $('institute_url').onchange = completeUrls;
  listenToToast();
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
  listenToExport();
  for (const button of document.querySelectorAll('[data-close]')) button.onclick = () => button.closest('dialog').close();
  $('cards').addEventListener('focusout', () => setTimeout(render));
  document.addEventListener('visibilitychange', () => { if (!document.hidden) checkHealth(); });
  setInterval(() => { if (state.drafts.some(isLive)) render(); }, 250);
}

buildForm();
buildDesign();
$('empty-art').append(drawBadge({name: 'Your first badge', level: 'Advanced'}));
listen();
watchOtherTabs();
loadDrafts();
takeDrops();
formChanged();
watchProtocol();
checkHealth();
