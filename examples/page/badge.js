'use strict';

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

async function pngOf(draft) {
  const image = new Image(1024, 1024);
  image.src = `data:image/svg+xml;base64,${base64(svgText(draft))}`;
  await image.decode();
  const canvas = element('canvas', {width: 1024, height: 1024});
  canvas.getContext('2d').drawImage(image, 0, 0, 1024, 1024);
  return new Promise(resolve => canvas.toBlob(resolve, 'image/png'));
}
