'use strict';

// ---- documents: the course from a file, read by the service and corrected here before anything is written

const DOCUMENTS = '.pdf,.docx,.pptx,.odt,.html,.htm,.md,.markdown,.txt,.text,text/plain,text/markdown,text/html';
let course = {source: '', language: '', notes: [], isDocument: false}; // where the text in the box comes from
let reading; // the upload that is under way, an XMLHttpRequest

const UNSPACED = /[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff]/g;

/** The words of a text as the service counts them: two letters of a script without spaces are about a word. */
const wordCount = text => (text.match(/\S+/g)?.length ?? 0) + Math.floor((text.match(UNSPACED)?.length ?? 0) / 2);

const LONG = 20000; // characters from which a browser takes its time with a text
const LITTLE = 12; // words: what else a draft from fewer says is mostly the model's own

function showLength() {
  const words = wordCount($('content').value), fits = state.health.content_words_that_fit;
  const isLong = Boolean(fits) && words > fits;
  const number = count => count.toLocaleString('en');
  const isShort = words > 0 && words < LITTLE, told = fits ? `${number(words)} of about ${number(fits)} words` : plural(words, 'word');
  setText($('words'), !words ? '' : isShort ? `${told}: little to go by` : told);
  $('words').classList.toggle('over', isLong || isShort);
  $('long-told').hidden = !isLong;
}

/** With dir=auto Chromium looks for the direction anew with each line that it takes in: seconds with a long text. */
function directContent(text) {
  const way = text.length < LONG ? 'auto' : startsRightToLeft(text) ? 'rtl' : 'ltr';
  if ($('content').dir !== way) $('content').dir = way;
}

function fillContent(text) {
  $('content').dir = 'ltr';
  $('content').value = text;
  directContent(text);
}

/** Chromium takes a pasted text in line by line, and is busy for seconds with a long one. */
function pasteLong(event, pasted) {
  const box = event.currentTarget, before = box.value;
  event.preventDefault();
  directContent(pasted);
  box.setRangeText(pasted, box.selectionStart, box.selectionEnd, 'end');
  courseEdited();
  formChanged();
  toast('A long text is pasted.', () => setContent(before, ''));
}

function setContent(text, source, {language = '', notes = [], isDocument = false} = {}) {
  course = {source, language, notes, isDocument};
  fillContent(text);
  $('content').scrollTop = 0;
  state.error = [];
  markInvalid([]);
  showCourse();
  formChanged();
}

/** What is typed is no sample any more; a document stays one while it is corrected. */
function courseEdited() {
  directContent($('content').value);
  if (!course.isDocument || !$('content').value.trim()) course = {source: '', language: '', notes: [], isDocument: false};
  showCourse();
}

function showCourse() {
  const {source, language, notes} = course;
  setText($('source'), source);
  $('content').lang = language === 'und' ? '' : language;
  $('found').hidden = !notes.length;
  const line = ({message, text}) => element('li', {textContent: text ? `${message} ${text}` : message});
  $('found-list').replaceChildren(...notes.map(line));
  store.write('course', source ? course : null);
}

function keptCourse() {
  course = store.read('course') ?? course;
  showCourse();
}

/** Send a file to `/extract`, its progress told in parts of one. Resolves to {status, body, retryAfter}. */
function sendDocument(file, key, onprogress) {
  return new Promise((resolve, reject) => {
    const form = new FormData();
    form.append('file', file);
    reading = new XMLHttpRequest(); // fetch tells nothing of an upload's progress
    reading.open('POST', new URL('extract', BASE));
    reading.responseType = 'json';
    if (key) reading.setRequestHeader('Authorization', `Bearer ${key}`);
    reading.upload.onprogress = event => { if (event.lengthComputable) onprogress(event.loaded / event.total); };
    reading.onload = ({target}) => resolve({status: target.status, body: target.response ?? {}, retryAfter: target.getResponseHeader('Retry-After')});
    reading.onabort = () => reject(new Problem('', {code: 'cancelled'}));
    reading.onerror = () => reject(new Problem(`${file.name} could not be sent: ${location.host} does not answer or takes no file of this size.`));
    reading.send(form);
  });
}

async function extracted(file, onprogress) {
  for (;;) {
    const key = storedKey();
    const {status, body, retryAfter} = await sendDocument(file, key, onprogress);
    if (status === 200) return body;
    if (status !== 401 || !await askForKey(key)) {
      if (status === 413) throw new Problem(`${file.name} is larger than this service takes. Choose a part of it, or paste its text.`, {status});
      throw new Problem(`${file.name}: ${body.detail ?? `The service answered ${status}. Try again in a moment.`}`, {status, code: body.error_code, retryAfter});
    }
  }
}

async function readFile(file) {
  reading?.abort();
  const before = {text: $('content').value, ...course}, focused = document.activeElement;
  showReading(file.name);
  const own = {};
  readFile.current = own;
  try {
    if ((await file.slice(0, 5).text()) === '{\\rtf') {
      throw new Problem(`${file.name} is in RTF, which is not read here. Open it in Word or LibreOffice, save it as .docx or .odt, and choose that.`);
    }
    const said = await extracted(file, part => showReading(file.name, part));
    const facts = [file.name, said.pages && plural(said.pages, 'page'), plural(said.words, 'word')].filter(Boolean);
    setContent(said.content, `From ${facts.join(', ')}. Read it and correct it before you write.`, {language: said.language, notes: said.notes, isDocument: true});
    announce(`${file.name} is read: ${plural(said.words, 'word')}. The text can be corrected in the course description.`);
    if ([document.body, $('open'), $('reading-stop'), focused].includes(document.activeElement)) {
      $('content').focus({preventScroll: true});
      $('content').setSelectionRange(0, 0);
    }
    if (before.text.trim()) toast('The course description was replaced.', () => setContent(before.text, before.source, before));
  } catch (problem) {
    if (problem.code !== 'cancelled') refuseForm(problem instanceof Problem ? problem : new Problem(`${file.name} cannot be opened. Choose it again.`));
  } finally {
    if (readFile.current === own) showReading('');
  }
}

/** The line under the box says what goes on, in the place of the hint. */
function showReading(name, part = 0) {
  const had = $('reading').contains(document.activeElement);
  $('reading').hidden = !name;
  $('content-hint').hidden = Boolean(name);
  $('content').setAttribute('aria-busy', String(Boolean(name)));
  setText($('reading-told'), !name ? '' : part < 1 ? `Sending ${name}` : `Reading ${name}`);
  if (part > 0 && part < 1) $('reading-bar').value = part;
  else $('reading-bar').removeAttribute('value');
  if (!name) reading = undefined;
  if (had && !name) $('open').focus();
}

/** The language of a pasted course, for the spell-check; a service that does not tell it is no fault. */
async function learnLanguage(text) {
  if (text.length < 80) return;
  try {
    const headers = {'Content-Type': 'text/plain; charset=utf-8', ...(storedKey() && {Authorization: `Bearer ${storedKey()}`})};
    const response = await fetch(new URL('extract', BASE), {method: 'POST', body: text.slice(0, 4000), headers});
    const {language = ''} = response.ok ? await response.json() : {};
    if (!course.isDocument && language !== 'und') $('content').lang = language;
  } catch { /* the spell-check goes on in the browser's own language */ }
}

function takeDrops() {
  const form = $('composer');
  const carriesFiles = event => [...event.dataTransfer?.types ?? []].includes('Files');
  addEventListener('dragover', event => { if (carriesFiles(event)) { event.preventDefault(); form.classList.add('dropping'); } });
  addEventListener('dragleave', event => { if (!event.relatedTarget) form.classList.remove('dropping'); });
  addEventListener('drop', event => {
    form.classList.remove('dropping');
    if (!carriesFiles(event)) return;
    event.preventDefault();
    const {files} = event.dataTransfer;
    if (files.length > 1) refuseForm(new Problem('One course at a time: drop a single document.'));
    else if (files[0]) readFile(files[0]);
  });
}

function listenToDocuments() {
  $('file').accept = DOCUMENTS;
  $('open').onclick = () => $('file').click();
  $('file').onchange = () => { if ($('file').files[0]) readFile($('file').files[0]); $('file').value = ''; };
  $('reading-stop').onclick = () => reading?.abort();
  $('content').addEventListener('paste', event => {
    const pasted = event.clipboardData?.getData('text/plain') ?? '';
    if (pasted.length >= LONG) pasteLong(event, pasted);
    setTimeout(() => learnLanguage($('content').value));
  });
}
