'use strict';

// ---- documents: the course from a file

async function readFile(file) {
  if (!/\.(txt|md|markdown|html?)$/i.test(file.name) && !file.type.startsWith('text/')) {
    return refuseForm(new Problem(`${file.name} is not a text file. Save it as .txt, .md or .html, or copy its text and paste it here.`));
  }
  if (file.size > 2 ** 20) return refuseForm(new Problem(`${file.name} is too large: a megabyte of text is more than the model can read.`));
  setContent(await file.text(), `From ${file.name}`);
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
    if (event.dataTransfer.files[0]) readFile(event.dataTransfer.files[0]);
  });
}
