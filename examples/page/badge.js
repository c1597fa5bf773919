'use strict';

// ---- the drawn badge: from name, level, institution and the design chosen for it

const SVG = 'http://www.w3.org/2000/svg';
const SERIF = "Georgia, 'Times New Roman', 'Liberation Serif', serif";
const SANS = "'Helvetica Neue', Helvetica, Arial, 'Liberation Sans', sans-serif";
const PALETTES = { // ground, field, metal
  Navy: ['#12263f', '#1f4468', '#f0c36d'], Forest: ['#14352c', '#24604d', '#e3cd86'], Wine: ['#431729', '#742a45', '#f0c2a2'],
  Indigo: ['#29264f', '#474390', '#cbc6ff'], Bronze: ['#4a2a0e', '#7d4a1c', '#f6d193'], Teal: ['#0b3a47', '#15606f', '#f6d59a'],
  Slate: ['#2a2e35', '#4c545f', '#dde3ec'], Plum: ['#3a1846', '#65307a', '#f2c6e2'],
};
const LOGO_SIDE = 256; // pixels: larger is not seen at the size it is drawn
const LOGO_BYTES = 90000; // as base64, so that a credential with it fits into a request

const around = (radius, steps) => Array.from({length: steps}, (_, step) => {
  const angle = step / steps * 2 * Math.PI - Math.PI / 2;
  return [120 + radius(step) * Math.cos(angle), 120 + radius(step) * Math.sin(angle)];
});
const at = ([x, y]) => `${x.toFixed(2)} ${y.toFixed(2)}`;
const polygon = points => `M${points.map(at).join('L')}Z`;

/** A closed curve without corners that the points pull outwards and inwards. */
function rounded(points) {
  const middle = index => {
    const [[x, y], [nextX, nextY]] = [points[index], points[(index + 1) % points.length]];
    return at([(x + nextX) / 2, (y + nextY) / 2]);
  };
  return `M${middle(points.length - 1)}${points.map((point, index) => `Q${at(point)} ${middle(index)}`).join('')}Z`;
}

const SHAPES = {
  Seal: rounded(around(step => step % 2 ? 98 : 116, 48)),
  Circle: 'M120 11A109 109 0 0 1 120 229A109 109 0 0 1 120 11Z',
  Hexagon: polygon(around(() => 110, 6)),
  Shield: 'M120 8C146 22 180 29 214 28C220 108 200 190 120 232C40 190 20 108 26 28C60 29 94 22 120 8Z',
  Star: polygon(around(step => step % 2 ? 94 : 113, 24)),
};
const LEVEL_SHAPES = {'': 'Seal', Beginner: 'Circle', Intermediate: 'Hexagon', Advanced: 'Shield', Expert: 'Star'};
const NAME_WIDTHS = {Shield: 136, Star: 142};

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

const CLINGS = /^[-\u2010-\u2015\u2212:;,.!?)\]}»”’、。，．：；！？）」』】]/; // begins no line

/** The text in lines as large as the box allows; what is too long ends in an ellipsis. */
function fitted(text, font, width, height, largest, smallest) {
  const han = '\\p{Script=Han}|\\p{Script=Hiragana}|\\p{Script=Katakana}|\\p{Script=Thai}';
  const found = text.match(new RegExp(`(?:${han})|(?:(?!${han})\\S){1,18}\\s*`, 'gu')) ?? [];
  const parts = found.reduce((kept, part) => {
    if (kept.length && CLINGS.test(part)) kept[kept.length - 1] += part;
    else kept.push(part);
    return kept;
  }, []);
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

/** The colours of a palette by name, or made of a colour of one's own: white text is read on the field. */
function coloursOf(colour) {
  if (PALETTES[colour]) return PALETTES[colour];
  const parts = [1, 3, 5].map(start => parseInt(colour.slice(start, start + 2), 16));
  const luminance = rgb => rgb.map(part => (part / 255) ** 2.2).reduce((sum, part, index) => sum + part * [.2126, .7152, .0722][index], 0);
  const hex = rgb => `#${rgb.map(part => Math.round(part).toString(16).padStart(2, '0')).join('')}`;
  let field = parts;
  while (luminance(field) > .15) field = field.map(part => part * .94);
  return [hex(field.map(part => part * .6)), hex(field), hex(parts.map(part => part * .3 + 255 * .7))];
}

function drawBadge({name, level = '', institution = '', colour = 'Navy', shape = '', logo = null, pattern = 0}) {
  const clean = text => text.replace(/[\p{Cc}\p{Cs}\ufffe\uffff]+/gu, ' ').trim();
  name = clean(name).replace(/^[-\u2010-\u2015\u2212\s]+/, '');
  institution = clean(institution);
  shape = SHAPES[shape] ? shape : LEVEL_SHAPES[level] ?? 'Seal';
  const [ground, field, metal] = coloursOf(colour);
  const inset = scale => ({d: SHAPES[shape], transform: `translate(120 120) scale(${scale}) translate(-120 -120)`, 'stroke-linejoin': 'round'});
  const drawn = svg('svg', {xmlns: SVG, viewBox: '0 0 240 240', width: 480, height: 480, role: 'img'});
  drawn.setAttribute('aria-label', ['Badge', name, level, institution].filter(Boolean).join(', '));
  drawn.append(
    svg('path', {...inset(1), fill: ground, stroke: ground, 'stroke-width': 8}),
    svg('path', {...inset(.95), fill: 'none', stroke: metal, 'stroke-width': 2.4}),
    svg('path', {...inset(.88), fill: field, stroke: field, 'stroke-width': 6}),
    rosette(pattern, metal),
    svg('ellipse', {cx: 120, cy: 118, rx: 80, ry: 46, fill: field, opacity: .82}),
    ...crown(level, logo, metal),
    ...title(name, shape),
    ...(institution ? ribbon(institution, ground, metal) : []),
  );
  if (!institution && !logo && !LEVELS.includes(level)) drawn.append(svg('path', {d: 'M120 178l4 9 9 4-9 4-4 9-4-9-9-4 9-4z', fill: metal}));
  return drawn;
}

function rosette(pattern, metal) {
  const petals = 9 + (pattern >>> 8) % 8, flat = 24 + (pattern >>> 16) % 30;
  const drawn = svg('g', {fill: 'none', stroke: metal, 'stroke-width': .7, opacity: .34});
  for (let petal = 0; petal < petals; petal++) {
    drawn.append(svg('ellipse', {cx: 120, cy: 120, rx: 76, ry: flat, transform: `rotate(${(petal * 180 / petals).toFixed(2)} 120 120)`}));
  }
  return drawn;
}

const LEVELS = Object.keys(LEVEL_SHAPES).slice(1);

/** Above the name: the logo on a white plate, or as many stars as the level has; and the level's name. */
function crown(level, logo, metal) {
  const drawn = [], pips = LEVELS.indexOf(level) + 1;
  if (logo) {
    const high = pips ? 27 : 34, wide = Math.min(72, Math.max(high * .6, high * logo.ratio));
    const [x, y] = [120 - wide / 2, pips ? 27 : 30];
    drawn.push(
      svg('rect', {x: x - 4, y: y - 4, width: wide + 8, height: high + 8, rx: 5, fill: '#fff'}),
      svg('image', {href: logo.data, x, y, width: wide, height: high, preserveAspectRatio: 'xMidYMid meet'}),
    );
  }
  for (let pip = 0; pip < pips && !logo; pip++) {
    const x = 120 + (pip - (pips - 1) / 2) * 15;
    drawn.push(svg('path', {d: `M${x} 42l2 4.600 5 .5-3.800 3.300 1.100 4.900-4.300-2.600-4.300 2.600 1.100-4.900-3.800-3.300 5-.5z`, fill: metal}));
  }
  if (pips) drawn.push(lettering(level.toUpperCase(), 120, 70, 9.5, {fill: metal, 'font-family': SANS, 'font-weight': 700, 'letter-spacing': 1.6}, `700 100px ${SANS}`));
  return drawn;
}

function title(name, shape) {
  const font = `700 100px ${SERIF}`;
  const {size, lines} = fitted(name, font, NAME_WIDTHS[shape] ?? 152, 84, 30, 10.5);
  return lines.map((line, index) => {
    const y = 118 + (index - (lines.length - 1) / 2) * size * 1.16 + size * .34;
    return lettering(line, 120, y, size, {fill: '#fff', 'font-family': SERIF, 'font-weight': 700}, font);
  });
}

/** The institution's name, whole, however long it is: in more lines and smaller where it must be. */
function ribbon(institution, ground, metal) {
  const font = `600 100px ${SANS}`, width = 168;
  const single = fitted(institution, font, width, 14.5, 12.5, 0);
  const {size, lines} = single.lines.length === 1 && single.size >= 9 ? single : fitted(institution, font, width, 35, 12.5, 0);
  const high = Math.max(28, lines.length * size * 1.16 + 9), top = 188 - high / 2, bottom = 188 + high / 2;
  const tail = (edge, way) => svg('path', {d: `M${edge} ${top + 6}h${way * 26}v${high}h${-way * 26}l${way * 9} ${-high / 2}z`, fill: metal});
  const fold = (edge, way) => svg('path', {d: `M${edge} ${bottom + 6}l${-way * 10}-6h${way * 10}z`, fill: ground});
  return [
    tail(14, 1), tail(226, -1),
    fold(40, 1), fold(200, -1),
    svg('path', {d: `M30 ${top}H210V${bottom}H30Z`, fill: metal, stroke: ground, 'stroke-width': 1.5}),
    ...lines.map((line, index) => {
      const y = 188 + (index - (lines.length - 1) / 2) * size * 1.16 + size * .36;
      return lettering(line, 120, y, size, {fill: ground, 'font-family': SANS, 'font-weight': 600}, font);
    }),
  ];
}

function drawGhost({level = '', shape = ''} = {}) {
  const outline = SHAPES[shape] ?? SHAPES[LEVEL_SHAPES[level]] ?? SHAPES.Seal;
  const path = svg('path', {d: outline, fill: 'none', stroke: 'currentColor', 'stroke-width': 2, 'stroke-dasharray': '5 6', opacity: .6});
  const ghost = svg('svg', {viewBox: '0 0 240 240', 'aria-hidden': 'true'}, path);
  ghost.classList.add('ghost');
  return ghost;
}

/** What a draft's badge is drawn from. Its colour comes from what no edit changes; drafts of one course differ in it. */
function artOf(draft) {
  const names = Object.keys(PALETTES), own = draft.art ?? {};
  return {
    name: draft.fields.name, level: requestOf(draft).badge_level, institution: requestOf(draft).institution,
    colour: own.colour || names[(hashOf(draft.batch) + draft.number) % names.length], shape: own.shape, logo: own.logo, pattern: hashOf(draft.id),
  };
}

/** Tells whether a drawing is another one, without the bytes of its logo. */
const artKey = ({logo, ...art}) => JSON.stringify({...art, logo: logo?.key});
const svgText = draft => new XMLSerializer().serializeToString(drawBadge(artOf(draft)));

async function pngOf(draft, side = 1024) {
  const drawn = drawBadge(artOf(draft));
  drawn.setAttribute('width', side); // or it would be enlarged after it is drawn
  drawn.setAttribute('height', side);
  const image = new Image(side, side);
  image.src = `data:image/svg+xml;base64,${base64(new XMLSerializer().serializeToString(drawn))}`;
  await image.decode();
  const canvas = element('canvas', {width: side, height: side});
  canvas.getContext('2d').drawImage(image, 0, 0, side, side);
  return new Promise(resolve => canvas.toBlob(resolve, 'image/png'));
}

// ---- the design: colour, shape and logo

let designing; // {draft, art}: the draft in the dialog, and what is chosen there

function openDesign(draft) {
  designing = {draft, art: {...draft.art}};
  const {colour = '', shape = ''} = designing.art;
  $('design-title').textContent = `Design of “${draft.fields.name}”`;
  $('design-error').textContent = '';
  const own = colour.startsWith('#');
  if (own) $('own-colour').value = colour;
  $('design').querySelector(`[name=colour][value="${own ? 'own' : colour}"]`).checked = true;
  $('design').querySelector(`[name=shape][value="${shape}"]`).checked = true;
  $('design-all').checked = false;
  drawDesign();
  $('design').showModal();
}

function drawDesign() {
  const {draft, art} = designing;
  $('design-art').replaceChildren(drawBadge(artOf({...draft, art})));
  $('logo-remove').hidden = !art.logo;
  setText($('logo-choose'), art.logo ? 'Another logo…' : 'Choose a logo…');
}

function takeDesign() {
  const {draft, art} = designing, everywhere = $('design-all').checked;
  const changed = everywhere ? [...state.drafts] : [draft];
  const before = changed.map(one => one.art), stored = store.read('design');
  const apply = (arts, kept) => {
    changed.forEach((one, index) => { one.art = arts[index]; save(one); });
    if (everywhere) store.write('design', kept);
    render();
  };
  apply(changed.map(() => art), art);
  toast(everywhere ? 'Every draft has this design, and new ones will.' : 'The design is changed.', () => apply(before, stored));
}

/** A logo as a small PNG: whatever the file could do besides is left behind. */
async function readLogo(file) {
  const address = await new Promise((resolve, reject) => {
    const reader = new FileReader();
    reader.onload = () => resolve(reader.result);
    reader.onerror = () => reject(reader.error);
    reader.readAsDataURL(file);
  });
  const image = new Image();
  image.src = address;
  await image.decode();
  const [width, height] = [image.naturalWidth || LOGO_SIDE, image.naturalHeight || LOGO_SIDE];
  for (let side = LOGO_SIDE; side >= 32; side /= 2) {
    const scale = side / Math.max(width, height);
    const canvas = element('canvas', {width: Math.max(1, Math.round(width * scale)), height: Math.max(1, Math.round(height * scale))});
    canvas.getContext('2d').drawImage(image, 0, 0, canvas.width, canvas.height);
    const data = canvas.toDataURL('image/png');
    if (data.length <= LOGO_BYTES) return {data, ratio: width / height, key: uid()};
  }
  throw new Error('too large');
}

async function chooseLogo(file) {
  $('design-error').textContent = '';
  try {
    if (file.size > 10 * 2 ** 20) throw new Error('too large');
    designing.art.logo = await readLogo(file);
    drawDesign();
  } catch {
    $('design-error').textContent = `${file.name} cannot be shown here. Choose a PNG, JPEG or SVG picture of at most 10 MB.`;
  }
}

function buildDesign() {
  const choice = (name, value, label, picture) => element('label', {title: label}, element('input', {type: 'radio', name, value}), picture, element('span', {textContent: label}));
  const icon = (...drawn) => svg('svg', {viewBox: '0 0 240 240', 'aria-hidden': 'true'}, ...drawn);
  const dot = (ground, metal) => icon(svg('circle', {cx: 120, cy: 120, r: 104, fill: ground, stroke: metal, 'stroke-width': 24}));
  const outline = d => icon(svg('path', {d, fill: 'none', stroke: 'currentColor', 'stroke-width': 14, 'stroke-linejoin': 'round'}));
  const mixed = icon(...Object.values(PALETTES).slice(0, 3).map(([, field, metal], index) => svg('circle', {cx: 60 + index * 60, cy: 120, r: 52, fill: field, stroke: metal, 'stroke-width': 12})));
  const own = choice('colour', 'own', 'Own colour', element('input', {type: 'color', id: 'own-colour', value: '#1f4468', ariaLabel: 'The own colour'}));
  $('colours').append(choice('colour', '', 'Automatic', mixed), ...Object.entries(PALETTES).map(([name, [, field, metal]]) => choice('colour', name, name, dot(field, metal))), own);
  $('shapes').append(choice('shape', '', 'By level', outline('M48 200V140H96V90H144V40H192V200Z')), ...Object.entries(SHAPES).map(([name, d]) => choice('shape', name, name, outline(d))));
  $('own-colour').oninput = () => { own.querySelector('[type=radio]').checked = true; };
  $('design').addEventListener('input', () => {
    const chosen = new FormData($('design').querySelector('form'));
    designing.art.colour = chosen.get('colour') === 'own' ? $('own-colour').value : chosen.get('colour');
    designing.art.shape = chosen.get('shape');
    drawDesign();
  });
  $('logo-choose').onclick = () => $('logo').click();
  $('logo').onchange = () => { if ($('logo').files[0]) chooseLogo($('logo').files[0]); $('logo').value = ''; };
  $('logo-remove').onclick = () => { delete designing.art.logo; drawDesign(); $('logo-choose').focus(); };
  $('design').querySelector('form').addEventListener('submit', takeDesign);
}
