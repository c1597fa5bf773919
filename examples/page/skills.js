'use strict';

// ---- skills of a badge: its own words (`tag`) and those of a framework (`alignment`)

const sameSkill = (one, other) => one.localeCompare(other, undefined, {sensitivity: 'accent'}) === 0;

/** The skills of a draft, those of a framework first, each once: [{name, framework, url}]. */
function skillsOf(draft) {
  const {alignment = [], tag = []} = draft.achievement ?? {};
  const found = alignment.map(({targetName, targetFramework, targetUrl}) => ({name: targetName, framework: targetFramework, url: targetUrl}));
  return [...found, ...tag.filter(name => !found.some(skill => sameSkill(skill.name, name))).map(name => ({name}))];
}

function setSkills(draft, {tag = [], alignment = []}) {
  const {tag: _tag, alignment: _alignment, ...rest} = draft.achievement;
  draft.achievement = {...rest, ...(tag.length && {tag}), ...(alignment.length && {alignment})};
  save(draft);
  render();
}

function addSkill(draft, {name, url, framework, type}) {
  name = name.trim();
  const {alignment = [], tag = []} = draft.achievement;
  if (!name || skillsOf(draft).some(skill => sameSkill(skill.name, name) && (skill.url || !url))) return;
  if (!url) return setSkills(draft, {alignment, tag: [...tag, name]});
  const aligned = {type: ['Alignment'], targetName: name, targetUrl: url, ...(framework && {targetFramework: framework}), ...(type && {targetType: type})};
  setSkills(draft, {tag: tag.some(one => sameSkill(one, name)) ? tag : [...tag, name], alignment: [...alignment, aligned]});
}

function removeSkill(draft, name) {
  const before = draft.achievement, {alignment = [], tag = []} = before;
  setSkills(draft, {tag: tag.filter(one => !sameSkill(one, name)), alignment: alignment.filter(one => !sameSkill(one.targetName, name))});
  toast(`The skill “${name}” is removed.`, () => setSkills(draft, before));
}

function makeSkills(draft) {
  const label = element('label', {htmlFor: `skill-${draft.id}`, textContent: 'Skills'}, element('span', {className: 'unseen', textContent: ` of draft ${draft.number}: add one`}));
  const input = element('input', {id: `skill-${draft.id}`, autocomplete: 'off', placeholder: 'Add a skill', maxLength: 200, dir: 'auto'});
  const options = element('ul', {id: `skills-found-${draft.id}`, className: 'options', role: 'listbox', ariaLabel: 'Skills found', hidden: true});
  for (const [name, value] of [['role', 'combobox'], ['aria-expanded', 'false'], ['aria-controls', options.id], ['aria-autocomplete', 'list']]) input.setAttribute(name, value);
  const told = element('p', {className: 'hint', role: 'status', dir: 'auto'});
  const chips = element('ul', {className: 'chips'}), suggestions = element('details', {className: 'suggestions'});
  const root = element('div', {className: 'skills', hidden: true}, element('div', {className: 'row spread'}, label), chips, element('div', {className: 'adding'}, input, options, told), suggestions);
  searchSkills(draft, input, options, told);
  return {root, chips, input, suggestions, drawn: ''};
}

/** A combobox (ARIA Authoring Practices): what is typed is a skill too where the index has none. */
function searchSkills(draft, input, options, told) {
  let found = [], chosen = -1, number = 0;
  const show = (skills, text = '') => {
    [found, chosen] = [skills, -1];
    setText(told, text);
    options.replaceChildren(...skills.map(({name, framework}, index) => {
      const option = element('li', {role: 'option', id: `${options.id}-${index}`, ariaSelected: 'false', onpointerdown: event => { event.preventDefault(); take(skills[index]); }}, name);
      if (framework) option.append(element('span', {className: 'hint', textContent: framework}));
      return option;
    }));
    options.hidden = !skills.length;
    input.setAttribute('aria-expanded', String(Boolean(skills.length)));
    input.removeAttribute('aria-activedescendant');
  };
  const choose = index => {
    chosen = index;
    [...options.children].forEach((option, at) => { option.ariaSelected = String(at === index); });
    input.setAttribute('aria-activedescendant', `${options.id}-${index}`);
    options.children[index].scrollIntoView({block: 'nearest'});
  };
  const take = skill => {
    number++;
    input.value = '';
    show([]);
    addSkill(draft, skill);
    announce(`${skill.name} added to the skills.`);
  };
  const ask = debounced(200, async () => {
    const asked = ++number, query = input.value.trim();
    if (!state.health.skills || query.length < 2) return show([]);
    try {
      const skills = await (await api(`skills?q=${encodeURIComponent(query)}`)).json();
      if (asked === number && document.activeElement === input) show(skills.slice(0, 8), skills.length ? '' : `No framework has it. Enter adds “${query}” as it is.`);
    } catch { if (asked === number) show([]); }
  });
  input.addEventListener('input', ask);
  input.addEventListener('blur', () => { number++; show([]); });
  input.addEventListener('keydown', event => {
    const step = {ArrowDown: 1, ArrowUp: -1}[event.key];
    if (step && found.length) {
      event.preventDefault();
      choose((chosen + step + found.length + (chosen < 0 && step < 0 ? 1 : 0)) % found.length);
    } else if (event.key === 'Escape' && found.length) {
      event.stopPropagation();
      show([]);
    } else if (event.key === 'Enter') {
      event.preventDefault();
      if (input.value.trim()) take(found[chosen] ?? {name: input.value});
    }
  });
}

function drawSkills(draft, parts) {
  parts.root.hidden = isLive(draft) || !draft.achievement;
  if (parts.root.hidden) return;
  const skills = skillsOf(draft);
  const offered = (draft.review?.suggestions ?? []).filter(({name}) => !skills.some(skill => sameSkill(skill.name, name)));
  const key = JSON.stringify([skills, offered, Boolean(state.health.skills)]);
  if (parts.drawn === key) return;
  parts.drawn = key;
  const focused = [...parts.chips.children].findIndex(chip => chip.contains(document.activeElement));
  const wasOffered = parts.suggestions.contains(document.activeElement) && document.activeElement.tagName === 'BUTTON';
  parts.input.placeholder = state.health.skills ? 'Search or add a skill' : 'Add a skill';
  parts.chips.replaceChildren(...skills.map(skill => chipOf(draft, skill)));
  parts.chips.hidden = !skills.length;
  parts.suggestions.hidden = !offered.length;
  const summary = parts.suggestions.querySelector('summary') ?? element('summary');
  summary.textContent = `${plural(offered.length, 'suggestion')}`;
  parts.suggestions.replaceChildren(summary, element('ul', {}, ...offered.map(skill => suggestionOf(draft, skill))));
  if (focused >= 0) (parts.chips.children[Math.min(focused, skills.length - 1)]?.querySelector('button') ?? parts.input).focus();
  if (wasOffered) (parts.suggestions.querySelector('button') ?? parts.input).focus();
}

function chipOf(draft, {name, framework, url}) {
  const isLink = /^https?:/i.test(url ?? '');
  const word = isLink ? element('a', {href: url, target: '_blank', rel: 'noopener noreferrer', textContent: name}) : element('span', {textContent: name});
  const chip = element('li', {}, word);
  if (framework) chip.append(element('span', {className: 'hint', textContent: framework}));
  chip.append(element('button', {type: 'button', textContent: '×', ariaLabel: `Remove the skill ${name}`, onclick: () => removeSkill(draft, name)}));
  return chip;
}

function suggestionOf(draft, skill) {
  const add = element('button', {type: 'button', className: 'quiet', textContent: `+ ${skill.name}`, onclick: () => { addSkill(draft, skill); announce(`${skill.name} added to the skills.`); }});
  const why = element('p', {className: 'hint', dir: 'auto'}, skill.framework ?? '', skill.sentence ? `: “${skill.sentence}”` : '');
  return element('li', {}, add, why);
}
