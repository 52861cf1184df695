/** The view of the page, without the model. */

import { type Caption, type Progress, type VLM, VlmportError } from '@vlmport/web';

function element<K extends HTMLElement>(id: string, kind: new () => K): K {
  const found = document.getElementById(id);
  if (found instanceof kind) return found;
  throw new Error(`the page has no ${id}`);
}

export const ui = {
  drop: element('drop', HTMLLabelElement),
  file: element('file', HTMLInputElement),
  preview: element('preview', HTMLImageElement),
  invitation: element('invitation', HTMLSpanElement),
  samples: element('samples', HTMLDivElement),
  ask: element('ask', HTMLFormElement),
  question: element('question', HTMLInputElement),
  device: element('device', HTMLSelectElement),
  stop: element('stop', HTMLButtonElement),
  forget: element('forget', HTMLButtonElement),
  again: element('again', HTMLButtonElement),
};

const load = element('load', HTMLDivElement);
const status = element('status', HTMLSpanElement);
const bytes = element('bytes', HTMLSpanElement);
const bar = element('progress', HTMLProgressElement);
const caption = element('caption', HTMLParagraphElement);
const talk = element('talk', HTMLOListElement);
const error = element('error', HTMLDivElement);
const facts = element('facts', HTMLElement);
const notes = element('notes', HTMLUListElement);

const fact = (name: string, text: string) =>
  (element(`fact-${name}`, HTMLElement).textContent = text);
const LONG = 140; // characters; a longer caption is set smaller
const megabytes = (count: number) => (count / 1e6).toFixed(1);

const PHASES: Readonly<Record<Progress['phase'], string>> = {
  download: 'Loading the model …',
  open: 'Preparing the model …',
  probe: 'Trying the device …',
  ready: 'Ready',
};

export function showProgress({ phase, loadedBytes, totalBytes }: Progress): void {
  load.hidden = false;
  // Screen readers read each change.
  if (status.textContent !== PHASES[phase]) status.textContent = PHASES[phase];
  bytes.textContent = `${megabytes(loadedBytes)} of ${megabytes(totalBytes)} MB`;
  bar.value = totalBytes ? loadedBytes / totalBytes : 0;
}

export function showLoading(): void {
  load.hidden = false;
  facts.hidden = true;
  status.textContent = 'Starting …';
  bytes.textContent = '';
  bar.removeAttribute('value');
  notes.replaceChildren();
  ui.ask.hidden = true;
  clearTexts();
  caption.dataset.empty = 'A caption appears here once the model is ready.';
  ui.stop.disabled = false;
  showError(null);
}

export function showModel(vlm: VLM): void {
  load.hidden = true;
  facts.hidden = false;
  ui.stop.disabled = true;
  fact('device', vlm.device === 'webgpu' ? 'WebGPU' : 'WebAssembly');
  fact('threads', vlm.device === 'wasm' && vlm.threads > 1 ? `${vlm.threads} threads` : '');
  fact('precision', vlm.precision);
  const said = [vlm.reason, ...vlm.notes].filter(one => one !== null);
  notes.replaceChildren(...said.map(text => item(sentence(text))));
  element('model', HTMLSpanElement).textContent = `Model: ${vlm.name}`;
  ui.ask.hidden = !vlm.takesQuestions;
  caption.dataset.empty = 'The caption appears here.';
}

let shown = ''; // the address of the shown file, whose memory is used until it is revoked

export function showImage(image: Blob | string): void {
  URL.revokeObjectURL(shown);
  shown = typeof image === 'string' ? '' : URL.createObjectURL(image);
  ui.preview.src = typeof image === 'string' ? image : shown;
  ui.preview.alt = 'The picture to caption';
}

/** Show the image once it is read, so that a bad file never shows as a broken image. */
ui.preview.onload = () => filled(true);
ui.preview.onerror = () => filled(false);

function filled(whether: boolean): void {
  ui.preview.hidden = !whether;
  ui.invitation.hidden = whether;
  ui.drop.classList.toggle('filled', whether);
  ui.file.setAttribute('aria-label', whether ? 'Choose another picture' : 'Choose a picture');
}

let text: HTMLElement = caption; // the element that is being filled

/** Remove the caption and all answers. */
export function clearTexts(): void {
  endText(null);
  caption.textContent = '';
  talk.replaceChildren();
}

export function beginCaption(): void {
  clearTexts();
  caption.dataset.empty = '';
  caption.classList.remove('long');
  begin(caption);
}

/** Show a question, with an empty answer below it. */
export function beginAnswer(question: string): void {
  endText(null);
  const answer = line(talk, 'answered', '');
  talk.insertBefore(line(talk, 'asked', question), answer);
  begin(answer);
  talk.scrollTop = talk.scrollHeight;
}

function begin(place: HTMLElement): void {
  showError(null);
  text = place;
  text.classList.add('writing');
  text.setAttribute('aria-busy', 'true');
  ui.stop.disabled = false;
  fact('first', '…');
  fact('speed', '…');
}

export function addPiece(piece: string): void {
  text.append(text.textContent === '' ? piece.trimStart() : piece);
  if (text === caption) caption.classList.toggle('long', (text.textContent ?? '').length > LONG);
  else talk.scrollTop = talk.scrollHeight;
}

/** End the text that is being filled; null for an abort. */
export function endText(made: Caption | null): void {
  text.classList.remove('writing');
  text.removeAttribute('aria-busy');
  caption.dataset.empty = error.hidden ? 'The caption appears here.' : '';
  if (text !== caption && text.textContent === '') text.textContent = made ? '(nothing)' : '–';
  ui.stop.disabled = true;
  const seconds = made && made.timings.image + made.timings.prefill;
  fact('first', seconds === null ? '–' : `${(seconds * 1000).toFixed(0)} ms`);
  const speed = made?.tokensPerSecond ?? 0;
  fact('speed', speed ? speed.toFixed(speed < 10 ? 1 : 0) : '–');
}

/** Show an error, or with null none. `canLoad` offers to load the model again. */
export function showError(thrown: unknown, { canLoad = false } = {}): void {
  error.hidden = thrown === null;
  ui.again.hidden = !canLoad;
  if (thrown === null) return;
  load.hidden = true;
  ui.stop.disabled = true;
  caption.dataset.empty = '';
  const [message, hint] =
    thrown instanceof VlmportError ? [thrown.message, thrown.hint] : [String(thrown), ''];
  element('error-message', HTMLElement).textContent = sentence(message);
  element('error-hint', HTMLElement).textContent = sentence(hint);
}

/** Show that the visitor stopped the download. */
export function showStopped(): void {
  showError(
    new VlmportError('DownloadError', 'download.failed', 'Stopped', 'the complete parts are kept'),
    {
      canLoad: true,
    },
  );
}

export function showStatus(text: string): void {
  notes.append(item(text));
}

function item(text: string): HTMLLIElement {
  const one = document.createElement('li');
  one.textContent = text;
  return one;
}

function line(list: HTMLOListElement, kind: string, text: string): HTMLLIElement {
  const one = item(text);
  one.className = kind;
  list.append(one);
  return one;
}

/** Write a message as a sentence; an address at its start is not changed. */
function sentence(text: string): string {
  if (text === '') return '';
  const start = /^\S+:\/\//.test(text) ? text[0]! : text[0]!.toUpperCase();
  return start + text.slice(1) + (/[.!?)]$/.test(text) ? '' : '.');
}
