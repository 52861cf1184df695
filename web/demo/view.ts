/** What the page shows. No model is known here. */

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
  device: element('device', HTMLSelectElement),
  stop: element('stop', HTMLButtonElement),
  forget: element('forget', HTMLButtonElement),
};

const load = element('load', HTMLDivElement);
const status = element('status', HTMLSpanElement);
const bytes = element('bytes', HTMLSpanElement);
const bar = element('progress', HTMLProgressElement);
const caption = element('caption', HTMLParagraphElement);
const error = element('error', HTMLDivElement);
const facts = element('facts', HTMLElement);
const notes = element('notes', HTMLUListElement);

const fact = (name: string, text: string) =>
  (element(`fact-${name}`, HTMLElement).textContent = text);
const megabytes = (count: number) => (count / 1e6).toFixed(1);

const PHASES: Readonly<Record<Progress['phase'], string>> = {
  download: 'Loading the model …',
  open: 'Preparing the model …',
  probe: 'Trying the device …',
  ready: 'Ready',
};

export function showProgress({ phase, loadedBytes, totalBytes }: Progress): void {
  load.hidden = false;
  status.textContent = PHASES[phase];
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
  caption.dataset.empty = '';
  showError(null);
}

export function showModel(vlm: VLM): void {
  load.hidden = true;
  facts.hidden = false;
  const { threads } = vlm;
  const onHost = threads === 1 ? 'WebAssembly' : `WebAssembly, ${threads} threads`;
  fact('device', vlm.device === 'webgpu' ? 'WebGPU' : onHost);
  fact('precision', vlm.precision);
  const said = [vlm.reason, ...vlm.notes].filter(one => one !== null);
  notes.replaceChildren(...said.map(text => item(capitalized(text))));
  element('model', HTMLSpanElement).textContent = `Model: ${vlm.name}`;
  caption.dataset.empty = 'The caption appears here.';
}

export function showPicture(url: string): void {
  ui.preview.src = url;
  ui.preview.hidden = false;
  ui.invitation.hidden = true;
  ui.drop.classList.add('filled');
  ui.preview.alt = 'The picture to caption';
}

export function beginCaption(): void {
  showError(null);
  caption.textContent = '';
  caption.dataset.empty = '';
  caption.classList.add('writing');
  caption.setAttribute('aria-busy', 'true');
  ui.stop.disabled = false;
  fact('first', '…');
  fact('speed', '…');
}

export function addPiece(piece: string): void {
  caption.append(piece);
}

export function endCaption(made: Caption | null): void {
  caption.classList.remove('writing');
  caption.removeAttribute('aria-busy');
  caption.dataset.empty = 'The caption appears here.';
  ui.stop.disabled = true;
  const seconds = made && made.timings.image + made.timings.prefill;
  fact('first', seconds === null ? '–' : `${(seconds * 1000).toFixed(0)} ms`);
  fact(
    'speed',
    made === null ? '–' : made.tokensPerSecond.toFixed(made.tokensPerSecond < 10 ? 1 : 0),
  );
}

export function showError(thrown: unknown): void {
  error.hidden = thrown === null;
  if (thrown === null) return;
  load.hidden = true;
  const [message, hint] =
    thrown instanceof VlmportError ? [thrown.message, thrown.hint] : [String(thrown), ''];
  element('error-message', HTMLElement).textContent = capitalized(message);
  element('error-hint', HTMLElement).textContent = hint;
}

export function showStatus(text: string): void {
  notes.append(item(text));
}

function item(text: string): HTMLLIElement {
  const line = document.createElement('li');
  line.textContent = text;
  return line;
}

const capitalized = (text: string) => text.slice(0, 1).toUpperCase() + text.slice(1);
