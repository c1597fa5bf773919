'use strict';

// ---- export

const base64 = text => btoa(Array.from(new TextEncoder().encode(text), byte => String.fromCharCode(byte)).join(''));
const fileName = (draft, extension) => `${draft.fields.name.toLowerCase().replace(/[^\p{L}\p{N}]+/gu, '-').replace(/^-+|-+$/g, '').slice(0, 60) || 'badge'}.${extension}`;

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
