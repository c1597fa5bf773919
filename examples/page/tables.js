'use strict';

// Tables as people have them: CSV of any usual dialect and encoding, and the first sheet of an XLSX workbook.
// It reads what `catalogue.py run` reads, to the same cells. A block, so that its names are no one else's.
{
const MAX_FILE = 32 * 2 ** 20; // bytes
const MAX_UNPACKED = 96 * 2 ** 20; // bytes of all parts of a workbook that are read
const MAX_ROWS = 20000;
const MAX_COLUMNS = 1000;
const SAMPLE = 2 ** 18; // characters from which the delimiter is told

const delimiterNames = {',': 'commas', ';': 'semicolons', '\t': 'tabs', '|': 'bars'};

/** {kind, isText, columns, rows: [{line, cells}]}. Throws Problem with a sentence that says what to do. */
async function readTable(file, encoding = '') {
  if (file.size > MAX_FILE) throw new Problem(`${file.name} is larger than ${MAX_FILE / 2 ** 20} MB. Split it, or use catalogue.py.`);
  const bytes = new Uint8Array(await file.arrayBuffer());
  const starts = (...values) => values.every((value, index) => bytes[index] === value);
  if (starts(0xd0, 0xcf, 0x11, 0xe0)) throw new Problem(`${file.name} is in Excel’s old format, or encrypted. Save it as .xlsx without a password.`);
  if (starts(0x50, 0x4b)) return withHeader(file, await readWorkbook(file, bytes));
  return withHeader(file, readText(file, bytes, encoding));
}

/** The first row names the columns; rows without anything are left out. */
function withHeader(file, {cells, ...told}) {
  const found = {...told, columns: [], rows: []};
  let header;
  for (const row of cells) {
    if (!row.cells.some(cell => cell.trim())) continue;
    if (!header) {
      header = row.cells.map(cell => cell.trim().replace(/\s+/g, ' '));
      if (header.length > MAX_COLUMNS) throw new Problem(`${file.name} has more than ${MAX_COLUMNS} columns. Leave only those of the courses.`);
      continue;
    }
    if (row.cells.slice(header.length).some(Boolean)) {
      throw new Problem(`${file.name}, line ${row.line}: more cells than columns. Put quotes around the texts, or name each column.`);
    }
    if (found.rows.push({line: row.line, cells: header.map((_, index) => row.cells[index] ?? '')}) > MAX_ROWS) {
      throw new Problem(`${file.name} has more than ${MAX_ROWS.toLocaleString('en')} rows. Split it, or use catalogue.py.`);
    }
  }
  if (!header) throw new Problem(`${file.name} is empty.`);
  if (!found.rows.length) throw new Problem(`${file.name} has the names of its columns, but no rows.`);
  found.columns = header.map((name, index) => name || `Column ${index + 1}`);
  return found;
}

// ---- CSV

function readText(file, bytes, encoding) {
  const named = encoding || encodingOf(bytes);
  let text;
  try {
    text = new TextDecoder(named, {fatal: true}).decode(bytes);
  } catch {
    throw new Problem(`${file.name} is not in ${named}. Choose its encoding.`, {code: 'wrong_encoding'});
  }
  if (/^%PDF|[\0-\x08\x0e-\x1f]/.test(text.slice(0, 2000))) throw new Problem(`${file.name} is not a table. Save it as .csv or .xlsx.`);
  const delimiter = delimiterOf(text);
  const start = text.match(/^sep=.?(\r\n|\r|\n)/)?.[0].length ?? 0;
  const kind = `CSV in ${named}, separated by ${delimiterNames[delimiter] ?? delimiter}`;
  return {kind, isText: true, cells: csvRows(text, delimiter, {start, line: start ? 2 : 1})};
}

/** By its mark, its zeros or its validity; what is left is Windows-1252, in which Excel writes in the West. */
function encodingOf(bytes) {
  if (bytes[0] === 0xff && bytes[1] === 0xfe) return 'utf-16le';
  if (bytes[0] === 0xfe && bytes[1] === 0xff) return 'utf-16be';
  if (bytes.subarray(0, 1000).includes(0)) return bytes[0] === 0 ? 'utf-16be' : 'utf-16le';
  try {
    new TextDecoder('utf-8', {fatal: true}).decode(bytes);
    return 'utf-8';
  } catch {
    return 'windows-1252';
  }
}

/** The one that makes more than one column of the header, and as many of the most rows. */
function delimiterOf(text) {
  const said = text.match(/^sep=(.)\r?\n/); // Excel's own way to name it
  if (said) return said[1];
  const isWhole = text.length <= SAMPLE;
  const sample = isWhole ? text : text.slice(0, text.lastIndexOf('\n', SAMPLE) + 1 || SAMPLE);
  let best = {delimiter: ',', fit: [-1]};
  for (const delimiter of Object.keys(delimiterNames)) {
    const widths = [];
    for (const {cells} of csvRows(sample, delimiter, {isSample: true})) {
      if (cells.length > 1 || cells[0]) widths.push(cells.length);
      if (widths.length === 100) break;
    }
    const width = widths[0] ?? 0;
    const fit = [Number(width > 1), widths.filter(one => one === width).length / Math.max(1, widths.length), width];
    const differs = fit.findIndex((value, index) => value !== best.fit[index]);
    if (differs >= 0 && fit[differs] > (best.fit[differs] ?? -1)) best = {delimiter, fit};
  }
  return best.delimiter;
}

/** Rows with the line on which each begins. Quotes may hold delimiters, line breaks and, doubled, quotes. */
function* csvRows(text, delimiter, {start = 0, line = 1, isSample = false} = {}) {
  const ends = new RegExp(`[${delimiter.replace(/[\\\]^-]/, '\\$&')}\\r\\n]`, 'g');
  const breaks = cell => cell.match(/\r\n|\r|\n/g)?.length ?? 0;
  let at = start;
  while (at < text.length) {
    const begins = line, cells = [];
    for (;;) {
      let cell = '';
      if (text[at] === '"') {
        const parts = [];
        do {
          let quote = text.indexOf('"', at + 1);
          if (quote < 0 && !isSample) throw new Problem(`Line ${begins}: a text begins with a quote that is never closed.`);
          if (quote < 0) quote = text.length;
          parts.push(text.slice(at + 1, quote));
          at = quote + 1;
        } while (text[at] === '"');
        cell = parts.join('"');
        line += breaks(cell);
      }
      ends.lastIndex = at;
      const end = ends.exec(text)?.index ?? text.length;
      cells.push(cell + text.slice(at, end));
      at = end;
      if (text[at] !== delimiter) break;
      at++;
    }
    at += text[at] === '\r' && text[at + 1] === '\n' ? 2 : 1;
    line++;
    yield {line: begins, cells};
  }
}

// ---- XLSX: a ZIP archive of XML parts (ECMA-376). Values as they are kept; no formula is worked out.

async function readWorkbook(file, bytes) {
  try {
    const book = new Workbook(bytes);
    return {isText: false, ...await book.firstSheet()};
  } catch (problem) {
    if (problem instanceof Problem) throw problem;
    throw new Problem(`${file.name} cannot be read as XLSX. Save it anew, or as CSV.`);
  }
}

const byName = (node, name) => [...node.getElementsByTagNameNS('*', name)];
const childrenOf = (node, name) => [...node?.children ?? []].filter(child => child.localName === name);

class Workbook {
  #bytes; #view; #parts = new Map(); #left = MAX_UNPACKED;

  /** Throws where this is no ZIP archive. */
  constructor(bytes) {
    this.#bytes = bytes;
    const view = this.#view = new DataView(bytes.buffer, bytes.byteOffset, bytes.byteLength);
    let end = bytes.length - 22;
    while (view.getUint32(end, true) !== 0x06054b50) end--; // a RangeError below zero
    let at = view.getUint32(end + 16, true);
    for (let count = view.getUint16(end + 10, true); count > 0; count--) {
      if (view.getUint32(at, true) !== 0x02014b50) throw new RangeError('no entry');
      const length = view.getUint16(at + 28, true);
      const name = new TextDecoder().decode(bytes.subarray(at + 46, at + 46 + length));
      this.#parts.set(name, {method: view.getUint16(at + 10, true), packed: view.getUint32(at + 20, true), at: view.getUint32(at + 42, true)});
      at += 46 + length + view.getUint16(at + 30, true) + view.getUint16(at + 32, true);
    }
  }

  async firstSheet() {
    const [[, path]] = [...await this.#related('')].filter(([type]) => type.endsWith('/officeDocument'));
    const book = await this.#xml(path);
    const related = await this.#related(path, 'Id');
    for (const sheet of byName(book, 'sheet')) {
      const id = [...sheet.attributes].find(one => one.localName === 'id' && one.prefix)?.value;
      const {type, target} = related.get(id) ?? {};
      if (!type?.endsWith('/worksheet')) continue; // a chart
      const of = kind => [...related.values()].find(one => one.type.endsWith(`/${kind}`))?.target;
      const strings = this.#parts.has(of('sharedStrings')) ? byName(await this.#xml(of('sharedStrings')), 'si').map(textOf) : [];
      const styles = this.#parts.has(of('styles')) ? datesIn(await this.#xml(of('styles'))) : [];
      const is1904 = /^(1|true)$/.test(byName(book, 'workbookPr')[0]?.getAttribute('date1904') ?? '');
      const rows = byName(await this.#xml(target), 'row');
      return {kind: `the sheet “${sheet.getAttribute('name')}”`, cells: sheetRows(rows, strings, styles, is1904)};
    }
    throw new Problem('The workbook has no sheet with cells.');
  }

  /** What a part refers to: by type, or {type, target} by id. */
  async #related(path, key) {
    const name = path.replace(/[^/]*$/, '_rels/$&.rels');
    return new Map(byName(await this.#xml(name), 'Relationship').map(one => {
      const type = one.getAttribute('Type');
      const target = decodeURIComponent(new URL(one.getAttribute('Target'), `http://parts/${path}`).pathname.slice(1));
      return key ? [one.getAttribute(key), {type, target}] : [type, target];
    }));
  }

  async #xml(name) {
    const bytes = await this.#unpacked(name);
    const isWide = bytes[0] === 0xff && bytes[1] === 0xfe;
    const text = new TextDecoder(isWide ? 'utf-16le' : 'utf-8', {fatal: true}).decode(bytes);
    if (text.slice(0, 1000).includes('<!DOCTYPE')) throw new SyntaxError('no part of a workbook has one');
    const parsed = new DOMParser().parseFromString(text, 'application/xml');
    if (byName(parsed, 'parsererror').length) throw new SyntaxError(name);
    return parsed;
  }

  /** The bytes of a part; no more than are allowed are ever unpacked. */
  async #unpacked(name) {
    const {method, packed, at} = this.#parts.get(name);
    const start = at + 30 + this.#view.getUint16(at + 26, true) + this.#view.getUint16(at + 28, true);
    let stream = new Blob([this.#bytes.subarray(start, start + packed)]).stream();
    if (method === 8) stream = stream.pipeThrough(new DecompressionStream('deflate-raw'));
    else if (method !== 0) throw new RangeError('packed in another way');
    const reader = stream.getReader(), pieces = [];
    for (;;) {
      const {done, value} = await reader.read();
      if (done) return new Uint8Array(await new Blob(pieces).arrayBuffer());
      this.#left -= value.length;
      if (this.#left < 0) {
        reader.cancel();
        throw new Problem(`The workbook holds more than ${MAX_UNPACKED / 2 ** 20} MB. Leave only the sheet of the courses, or save it as CSV.`);
      }
      pieces.push(value);
    }
  }
}

/** A string's text: its own and that of its runs, not that which tells how to say it. */
function textOf(item) {
  const runs = childrenOf(item, 'r').flatMap(run => childrenOf(run, 't'));
  return [...childrenOf(item, 't'), ...runs].map(node => node.textContent).join('')
    .replace(/_x([0-9A-Fa-f]{4})_/g, (_, code) => String.fromCharCode(parseInt(code, 16)));
}

/** For each style of a cell, whether its number is a date. */
function datesIn(styles) {
  const formats = new Map(byName(styles, 'numFmt').map(one => [one.getAttribute('numFmtId'), one.getAttribute('formatCode') ?? '']));
  const isDate = id => {
    const format = formats.get(id)?.replace(/"[^"]*"|\\.|\[(?!h+\]|m+\]|s+\])[^\]]*\]/gi, '');
    return format === undefined ? (id >= 14 && id <= 22) || (id >= 45 && id <= 47) : /[dmyhs]/i.test(format);
  };
  return childrenOf(byName(styles, 'cellXfs')[0], 'xf').map(one => isDate(one.getAttribute('numFmtId')));
}

function* sheetRows(rows, strings, dates, is1904) {
  let line = 0;
  for (const row of rows) {
    line = Number(row.getAttribute('r')) || line + 1;
    const cells = [];
    let column = -1;
    for (const cell of childrenOf(row, 'c')) {
      const letters = cell.getAttribute('r')?.match(/^[A-Z]+/)?.[0] ?? '';
      column = letters ? [...letters].reduce((sum, letter) => sum * 26 + letter.charCodeAt(0) - 64, 0) - 1 : column + 1;
      const text = cellText(cell, strings, dates, is1904);
      if (!text) continue;
      if (column >= MAX_COLUMNS) throw new Problem(`Line ${line} has cells beyond the ${MAX_COLUMNS}th column. Leave only those of the courses.`);
      while (cells.length < column) cells.push('');
      cells[column] = text;
    }
    yield {line, cells};
  }
}

/** A cell as it is seen, as near as its value tells. */
function cellText(cell, strings, dates, is1904) {
  const type = cell.getAttribute('t') ?? 'n';
  if (type === 'inlineStr') return textOf(childrenOf(cell, 'is')[0]);
  const value = childrenOf(cell, 'v')[0]?.textContent ?? '';
  if (!value) return '';
  if (type === 's') return strings[Number(value)] ?? '';
  if (type === 'b') return value === '1' ? 'True' : 'False';
  if (type !== 'n') return value;
  if (dates[Number(cell.getAttribute('s') ?? 0)]) return dateText(Number(value), is1904);
  return /^-?\d+$/.test(value) ? value : String(Number(value));
}

/** Days since the end of 1899 (or the start of 1904) as date and time. The year 1900 had no 29 February, but Excel has. */
function dateText(days, is1904) {
  const base = is1904 ? Date.UTC(1904, 0, 1) : Date.UTC(1899, 11, days < 60 ? 31 : 30);
  const at = new Date(base + Math.round(days * 86400) * 1000);
  if (Number.isNaN(at.getTime())) return String(days);
  const [day, time] = at.toISOString().slice(0, 19).split('T');
  return days >= 0 && days < 1 ? time : `${day} ${time}`;
}

globalThis.readTable = readTable;
}
