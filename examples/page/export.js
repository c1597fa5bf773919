'use strict';

// ---- export: for people first, then for systems

const base64 = text => btoa(Array.from(new TextEncoder().encode(text), byte => String.fromCharCode(byte)).join(''));
const fileName = (draft, extension) => `${draft.fields.name.toLowerCase().replace(/[^\p{L}\p{N}]+/gu, '-').replace(/^-+|-+$/g, '').slice(0, 60) || 'badge'}.${extension}`;

/** Hand a file to the browser's downloads, and say so. */
function download(blob, name, tell = toast) {
  const url = URL.createObjectURL(blob);
  element('a', {href: url, download: name}).click();
  setTimeout(() => URL.revokeObjectURL(url), 60000);
  tell(`${name} is in your downloads.`);
}

async function copy(text, tell = toast) {
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
  tell('Copied.');
}

// What a draft says, in pieces that paper, Word and a table take

const startsRightToLeft = text => /^[^\p{L}]*[\u0590-\u08ff\ufb1d-\ufefc]/u.test(text);
const languageOf = ({review}) => [undefined, null, 'und'].includes(review?.language) ? '' : review.language;
const runsOf = text => text.split(/\*\*(.+?)\*\*/).map((run, index) => ({text: run, bold: index % 2 === 1})).filter(run => run.text);

/** Paragraphs and items of a list of the few marks of Markdown that drafts have. */
function blocksOf(markdown) {
  const lines = markdown.split('\n').map(line => line.trim()).filter(Boolean);
  return lines.map(line => {
    const [, item] = /^(?:[-*+•]|\d+[.)])\s+(.*)/.exec(line) ?? [];
    return {isItem: item !== undefined, runs: runsOf(item ?? line.replace(/^#+\s+/, ''))};
  });
}

const factsOf = draft => [['Level', requestOf(draft).badge_level], ['Institution', requestOf(draft).institution]].filter(([, value]) => value);

// Word: a ZIP archive of a few XML files, none of them compressed

const CRC = Uint32Array.from({length: 256}, (_, value) => {
  for (let bit = 0; bit < 8; bit++) value = value & 1 ? value >>> 1 ^ 0xedb88320 : value >>> 1;
  return value;
});

/** A ZIP archive of {name: text or bytes}, stored (APPNOTE.TXT 4.3). */
function zipOf(files) {
  const parts = [], directory = [];
  let offset = 0;
  const numbers = (...fields) => { // pairs of bytes and value, little-endian
    const bytes = [];
    for (const [size, value] of fields) for (let byte = 0; byte < size; byte++) bytes.push(value >>> 8 * byte & 255);
    return Uint8Array.from(bytes);
  };
  for (const [path, content] of Object.entries(files)) {
    const name = new TextEncoder().encode(path), data = typeof content === 'string' ? new TextEncoder().encode(content) : content;
    let crc = 0xffffffff;
    for (const byte of data) crc = CRC[(crc ^ byte) & 255] ^ crc >>> 8;
    const facts = [[2, 20], [2, 0x800], [2, 0], [2, 0], [2, 0x21], [4, ~crc], [4, data.length], [4, data.length], [2, name.length], [2, 0]];
    const head = numbers([4, 0x04034b50], ...facts);
    parts.push(head, name, data);
    directory.push(numbers([4, 0x02014b50], [2, 20], ...facts, [2, 0], [2, 0], [2, 0], [4, 0], [4, offset]), name);
    offset += head.length + name.length + data.length;
  }
  const size = directory.reduce((sum, part) => sum + part.length, 0), count = Object.keys(files).length;
  const end = numbers([4, 0x06054b50], [2, 0], [2, 0], [2, count], [2, count], [4, size], [4, offset], [2, 0]);
  return new Blob([...parts, ...directory, end], {type: 'application/vnd.openxmlformats-officedocument.wordprocessingml.document'});
}

const xml = text => text.replace(/[^\t\n\r -\ud7ff\ue000-\ufffd\u{10000}-\u{10ffff}]/gu, '').replace(/[&<>"]/g, mark => `&#${mark.charCodeAt()};`);
const OPEN_XML = 'http://schemas.openxmlformats.org';
const WORD_STYLES = {
  Normal: ['Normal', '<w:spacing w:after="120" w:line="276" w:lineRule="auto"/>', '<w:sz w:val="22"/><w:szCs w:val="22"/>'],
  Title: ['Title', '<w:keepNext/><w:spacing w:before="120" w:after="120"/>', '<w:b/><w:bCs/><w:sz w:val="40"/><w:szCs w:val="40"/>'],
  Heading1: ['heading 1', '<w:keepNext/><w:spacing w:before="280" w:after="80"/><w:outlineLvl w:val="0"/>', '<w:b/><w:bCs/><w:sz w:val="26"/><w:szCs w:val="26"/>'],
  ListParagraph: ['List Paragraph', '<w:numPr><w:numId w:val="1"/></w:numPr><w:spacing w:after="60"/>', ''],
};

function wordParagraph(runs, style = '', more = '') {
  const isRight = startsRightToLeft(runs.map(run => run.text).join(''));
  const marks = `${style && `<w:pStyle w:val="${style}"/>`}${more}${isRight ? '<w:bidi/>' : ''}`;
  const said = runs.map(({text, bold}) => {
    const looks = `${bold ? '<w:b/><w:bCs/>' : ''}${isRight ? '<w:rtl/>' : ''}`;
    return `<w:r>${looks && `<w:rPr>${looks}</w:rPr>`}<w:t xml:space="preserve">${xml(text)}</w:t></w:r>`;
  });
  return `<w:p>${marks && `<w:pPr>${marks}</w:pPr>`}${said.join('')}</w:p>`;
}

function wordPicture(number, label) {
  const size = 1700000; // English Metric Units: 4.7 cm
  const shape = `<pic:nvPicPr><pic:cNvPr id="${number}" name="badge${number}.png"/><pic:cNvPicPr/></pic:nvPicPr>`
    + `<pic:blipFill><a:blip r:embed="image${number}"/><a:stretch><a:fillRect/></a:stretch></pic:blipFill>`
    + `<pic:spPr><a:xfrm><a:off x="0" y="0"/><a:ext cx="${size}" cy="${size}"/></a:xfrm><a:prstGeom prst="rect"><a:avLst/></a:prstGeom></pic:spPr>`;
  return `<w:p><w:r><w:drawing><wp:inline><wp:extent cx="${size}" cy="${size}"/><wp:docPr id="${number}" name="Badge ${number}" descr="${xml(label)}"/>`
    + `<a:graphic><a:graphicData uri="${OPEN_XML}/drawingml/2006/picture"><pic:pic>${shape}</pic:pic></a:graphicData></a:graphic></wp:inline></w:drawing></w:r></w:p>`;
}

function wordBody(draft, number) {
  const plain = text => [{text, bold: false}];
  const block = ({isItem, runs}) => wordParagraph(runs, isItem ? 'ListParagraph' : '');
  const skills = skillsOf(draft).map(({name, framework, url}) => wordParagraph(plain([name, framework, url].filter(Boolean).join(', ')), 'ListParagraph'));
  const facts = factsOf(draft).map(([label, value]) => wordParagraph([{text: `${label}: `, bold: true}, {text: value, bold: false}]));
  return [
    number > 1 ? '<w:p><w:r><w:br w:type="page"/></w:r></w:p>' : '', wordPicture(number, `The badge ${draft.fields.name}`),
    wordParagraph(plain(draft.fields.name), 'Title'), ...facts,
    wordParagraph(plain('Description'), 'Heading1'), ...blocksOf(draft.fields.description).map(block),
    wordParagraph(plain('Criteria'), 'Heading1'), ...blocksOf(draft.fields.criteria).map(block),
    ...(skills.length ? [wordParagraph(plain('Skills'), 'Heading1'), ...skills] : []),
  ].join('');
}

async function wordOf(drafts) {
  const pictures = await Promise.all(drafts.map(async draft => new Uint8Array(await (await pngOf(draft, 600)).arrayBuffer())));
  const names = `xmlns:w="${OPEN_XML}/wordprocessingml/2006/main" xmlns:r="${OPEN_XML}/officeDocument/2006/relationships" `
    + `xmlns:wp="${OPEN_XML}/drawingml/2006/wordprocessingDrawing" xmlns:a="${OPEN_XML}/drawingml/2006/main" xmlns:pic="${OPEN_XML}/drawingml/2006/picture"`;
  const file = (tag, inner, namespaces = names) => `<?xml version="1.0" encoding="UTF-8" standalone="yes"?>\n<${tag} ${namespaces}>${inner}</${tag}>`;
  const relations = entries => file('Relationships', entries.map(([id, type, target]) => `<Relationship Id="${id}" Type="${OPEN_XML}/officeDocument/2006/relationships/${type}" Target="${target}"/>`).join(''), `xmlns="${OPEN_XML}/package/2006/relationships"`);
  const main = 'application/vnd.openxmlformats-officedocument.wordprocessingml';
  const override = (part, type) => `<Override PartName="/word/${part}.xml" ContentType="${main}.${type}+xml"/>`;
  const style = ([id, [name, paragraph, run]]) => `<w:style w:type="paragraph"${id === 'Normal' ? ' w:default="1"' : ''} w:styleId="${id}"><w:name w:val="${name}"/>`
    + `${id === 'Normal' ? '' : '<w:basedOn w:val="Normal"/>'}<w:qFormat/><w:pPr>${paragraph}</w:pPr><w:rPr>${run}</w:rPr></w:style>`;
  const language = languageOf(drafts[0]);
  const defaults = `<w:docDefaults><w:rPrDefault><w:rPr><w:rFonts w:ascii="Calibri" w:hAnsi="Calibri" w:cs="Arial"/>${language && `<w:lang w:val="${xml(language)}" w:eastAsia="${xml(language)}" w:bidi="${xml(language)}"/>`}</w:rPr></w:rPrDefault></w:docDefaults>`;
  return zipOf({
    '[Content_Types].xml': file('Types', `<Default Extension="rels" ContentType="application/vnd.openxmlformats-package.relationships+xml"/><Default Extension="png" ContentType="image/png"/>`
      + override('document', 'document.main') + override('styles', 'styles') + override('numbering', 'numbering'), `xmlns="${OPEN_XML}/package/2006/content-types"`),
    '_rels/.rels': relations([['document', 'officeDocument', 'word/document.xml']]),
    'word/_rels/document.xml.rels': relations([['styles', 'styles', 'styles.xml'], ['numbering', 'numbering', 'numbering.xml'], ...pictures.map((_, index) => [`image${index + 1}`, 'image', `media/badge${index + 1}.png`])]),
    'word/styles.xml': file('w:styles', defaults + Object.entries(WORD_STYLES).map(style).join('')),
    'word/numbering.xml': file('w:numbering', '<w:abstractNum w:abstractNumId="1"><w:lvl w:ilvl="0"><w:numFmt w:val="bullet"/><w:lvlText w:val="•"/><w:pPr><w:ind w:left="425" w:hanging="283"/></w:pPr></w:lvl></w:abstractNum>'
      + '<w:num w:numId="1"><w:abstractNumId w:val="1"/></w:num>'),
    'word/document.xml': file('w:document', `<w:body>${drafts.map((draft, index) => wordBody(draft, index + 1)).join('')}<w:sectPr><w:pgMar w:top="1134" w:right="1247" w:bottom="1134" w:left="1247"/></w:sectPr></w:body>`),
    ...Object.fromEntries(pictures.map((picture, index) => [`word/media/badge${index + 1}.png`, picture])),
  });
}

// A table: what a spreadsheet would take for a formula gets an apostrophe in front (OWASP, CSV injection)

function csvOf(drafts) {
  const listed = text => text.split('\n').map(line => line.replace(/^\s*[-*+]\s+/, '• ')).join('\n');
  const skill = ({name, url}) => url ? `${name} (${url})` : name;
  const rows = drafts.map(draft => [
    draft.fields.name, draft.fields.description, listed(draft.fields.criteria), requestOf(draft).badge_level ?? '', requestOf(draft).institution ?? '',
    skillsOf(draft).map(skill).join('; '), languageOf(draft),
  ]);
  const cell = text => `"${(/^'*[=+\-@\t\r\n]/.test(text) ? `'${text}` : text).replaceAll('"', '""')}"`;
  const table = [['name', 'description', 'criteria', 'level', 'institution', 'skills', 'language'], ...rows];
  return new Blob(['\ufeff', table.map(row => row.map(cell).join(',') + '\r\n').join('')], {type: 'text/csv;charset=utf-8'});
}

// Paper: `#sheet` is all that a print has

function sheetOf(draft) {
  const said = ({runs}) => runs.map(({text, bold}) => bold ? element('b', {textContent: text}) : text);
  const text = markdown => {
    const parts = [];
    for (const block of blocksOf(markdown)) {
      if (!block.isItem) parts.push(element('p', {dir: 'auto'}, ...said(block)));
      else {
        if (parts.at(-1)?.tagName !== 'UL') parts.push(element('ul', {dir: 'auto'}));
        parts.at(-1).append(element('li', {}, ...said(block)));
      }
    }
    return parts;
  };
  const skills = skillsOf(draft).map(({name, framework, url}) => element('li', {}, [name, framework].filter(Boolean).join(', '), ...(url ? [element('br'), element('small', {textContent: url})] : [])));
  return element('article', {lang: languageOf(draft)},
    element('div', {className: 'art'}, drawBadge(artOf(draft))), element('h1', {textContent: draft.fields.name, dir: 'auto'}),
    ...factsOf(draft).map(([label, value]) => element('p', {}, element('b', {textContent: `${label}: `}), value)),
    element('h2', {textContent: 'Description'}), ...text(draft.fields.description),
    element('h2', {textContent: 'Criteria'}), ...text(draft.fields.criteria),
    ...(skills.length ? [element('h2', {textContent: 'Skills'}), element('ul', {}, ...skills)] : []));
}

function printDrafts(drafts) {
  $('sheet').replaceChildren(...drafts.map(sheetOf));
  const title = document.title;
  document.title = drafts[0].fields.name; // the name of the PDF
  window.print();
  document.title = title;
}

// The dialog

let exporting; // the draft in the dialog
let built = 0; // counts previews: only the last asked for is shown

function openExport(draft) {
  exporting = draft;
  const request = requestOf(draft), issuer = store.read('issuer') ?? {};
  $('issuer-name').value = issuer.name ?? request.institution ?? '';
  $('issuer-id').value = issuer.id ?? request.institute_url ?? '';
  $('export-title').textContent = `Export “${draft.fields.name}”`;
  $('export-error').textContent = $('export-told').textContent = $('preview').textContent = '';
  const others = wholeDrafts().filter(other => other !== draft).length;
  $('export-all').checked = false;
  $('export-all').closest('label').hidden = !others;
  setText($('export-all-told'), `All ${others + 1} finished drafts in one`);
  $('export').showModal();
  preview();
}

const wholeDrafts = () => state.drafts.filter(draft => !isBusy(draft) && isWhole(draft));
const exportedDrafts = () => $('export-all').checked ? wholeDrafts() : [exporting];
const exportFormat = () => new FormData($('export').querySelector('form')).get('format');
const tellExport = text => { $('export-told').textContent = text; };
const SAVES = {word: 'Download for Word', print: 'Print…', csv: 'Download CSV'};

/** An e-mail address is meant as a mailto: URI. */
const completedRecipient = text => /^[^\s@:/]+@[^\s@]+\.[^\s@]+$/.test(text.trim()) ? `mailto:${text.trim()}` : completedUrl(text);

async function exported() {
  const format = exportFormat(), draft = exporting;
  const badge = badgeOf(draft);
  if (format === 'badge') return badge;
  const {name, description, criteria} = draft.fields;
  const achievement = draft.achievement && {...draft.achievement, name, description, criteria: {narrative: criteria}};
  const issuer = format === 'credential' ? {id: completedUrl($('issuer-id').value), name: $('issuer-name').value.trim()} : {id: 'did:example:issuer', name: 'Issuer'};
  if (!issuer.id || !issuer.name) throw new Problem('Name the issuer and its web address: a credential says who awards it.', {code: 'no_issuer'});
  const image = $('export').querySelector('[name=image]').checked ? `data:image/svg+xml;base64,${base64(svgText(draft))}` : undefined;
  const recipient = format === 'credential' && completedRecipient($('recipient').value) || undefined;
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
  showChoices(format);
  if (format in SAVES) return null;
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

/** A fault as the service has found it, in the words of the page. */
function exportFault({loc, msg}) {
  const known = {
    'issuer.name': ['issuer-name', msg],
    'issuer.id': ['issuer-id', 'write the address of the institution with https:// in front, for example https://example.edu'],
    recipient_id: ['recipient', 'write an e-mail address, a web address or a DID, for example learner@example.edu'],
  }[loc.join('.')];
  if (known) return {control: known[0], label: labelOf(known[0]), msg: known[1]};
  const name = Object.keys(FIELDS).find(name => loc[0] !== 'issuer' && String(loc[1]).endsWith(name));
  if (!name) return {label: loc.join(' '), msg};
  return {label: FIELDS[name].label, msg: exporting.fields[name].trim() ? msg : 'there is nothing yet; close this and write it in the draft'};
}

function showExportFault(problem, isFinal) {
  const faults = (problem.errors ?? []).map(exportFault);
  const text = faults.map(({label, msg}) => `${label}: ${msg}.`).join(' ');
  $('export-error').textContent = text || problem.message;
  const wrong = problem.code === 'no_issuer' ? ['issuer-name', 'issuer-id'].filter(id => !$(id).value.trim()) : faults.map(fault => fault.control).filter(Boolean);
  wrong.forEach(id => $(id).setAttribute('aria-invalid', 'true'));
  if (isFinal && wrong.length) $(wrong[0]).focus();
}

/** What belongs to the chosen format, and nothing else. */
function showChoices(format) {
  const isJson = !(format in SAVES), others = wholeDrafts().filter(draft => draft !== exporting).length;
  $('issuer-fields').hidden = format !== 'credential';
  $('recipient-told').hidden = format !== 'credential' || Boolean($('recipient').value.trim());
  $('image-choice').hidden = !isJson || format === 'badge';
  $('export-all').closest('label').hidden = isJson || !others;
  $('preview').hidden = $('export-copy').hidden = !isJson;
  setText($('export-save'), SAVES[format] ?? 'Download JSON');
  if (isJson) return;
  $('export-error').textContent = '';
  built++; // a preview on its way is no longer wanted
}

async function takeExport(action) {
  const text = await preview(true);
  if (text !== null) action(text, fileName(exporting, exportFormat() === 'badge' ? 'json' : `${exportFormat()}.json`));
}

async function saveExport() {
  const format = exportFormat(), drafts = exportedDrafts();
  const name = extension => drafts.length > 1 ? `badge-drafts.${extension}` : fileName(drafts[0], extension);
  tellExport('');
  if (format === 'word') download(await wordOf(drafts), name('docx'), tellExport);
  else if (format === 'csv') download(csvOf(drafts), name('csv'), tellExport);
  else if (format === 'print') printDrafts(drafts);
  else await takeExport((text, file) => download(new Blob([text], {type: 'application/json'}), file, tellExport));
}

function listenToExport() {
  const systems = $('for-systems');
  $('export').addEventListener('input', debounced(250, () => preview()));
  $('export').addEventListener('change', event => { if (event.target.name === 'format') { tellExport(''); preview(); } });
  // One click leads to the credential, and one back to what people read.
  systems.addEventListener('toggle', () => {
    const inside = systems.querySelector(':checked[name=format]');
    if (systems.open && !inside) systems.querySelector('[value=credential]').checked = true;
    if (!systems.open && inside) $('export').querySelector('[value=word]').checked = true;
    preview();
  });
  $('issuer-id').addEventListener('change', () => { $('issuer-id').value = completedUrl($('issuer-id').value); });
  $('recipient').addEventListener('change', () => { $('recipient').value = completedRecipient($('recipient').value); });
  $('export-copy').onclick = () => takeExport(text => copy(text, tellExport));
  $('export').addEventListener('submit', event => { event.preventDefault(); saveExport(); });
  addEventListener('beforeprint', () => { // the browser's own Print
    if (!$('sheet').childElementCount) $('sheet').replaceChildren(...wholeDrafts().map(sheetOf));
  });
  addEventListener('afterprint', () => $('sheet').replaceChildren());
}
