/**
 * The demo: choose, drop or paste an image, and read its caption; ask about it, where the model
 * answers questions.
 *
 * `?model=URL` sets another bundle than the one next to the page; `?device=` and `?precision=` are
 * options of `VLM.load`.
 */

import { type Caption, type Conversation, VLM, type VlmOptions, clearCache } from '@vlmport/web';
import * as view from './view.js';
import { ui } from './view.js';

const asked = new URLSearchParams(location.search);
const model = asked.get('model') ?? './bundle/';
const samples = import.meta.glob<string>('../../examples/*.png', {
  eager: true,
  query: '?url',
  import: 'default',
});
// One text, which is shown as it is written, also where the model's own defaults are beams.
const ONE = { numBeams: 1, numReturnSequences: 1 } as const;
const SHOWN = ['red_square', 'yellow_circle', 'green_triangle', 'red_circle'];

let vlm: Promise<VLM> | null = null;
let loading = new AbortController();
let writing = new AbortController();
let image: Blob | string | null = null;
let chat: Conversation | null = null; // about the image

async function load(): Promise<void> {
  loading.abort();
  writing.abort();
  void vlm?.then(
    old => old.dispose(),
    () => {},
  );
  const mine = (loading = new AbortController());
  chat = null;
  view.showLoading();
  const options: VlmOptions = {
    device: ui.device.value as 'auto' | 'webgpu' | 'wasm',
    precision: asked.get('precision') ?? 'auto',
    onProgress: view.showProgress,
    signal: mine.signal,
  };
  vlm = VLM.load(model, options);
  try {
    view.showModel(await vlm);
    if (image !== null) await write(image);
  } catch (error) {
    if (mine !== loading) return; // another load has begun
    if (mine.signal.aborted) view.showStopped();
    else view.showError(error, { canLoad: true });
  }
}

/** Caption an image; an open caption or answer is aborted. */
async function write(source: Blob | string): Promise<void> {
  image = source;
  chat?.reset();
  view.showImage(source);
  await follow((ready, signal) => {
    view.beginCaption();
    return ready.stream(source, { ...ONE, signal });
  });
}

/** Ask about the image; an open caption or answer is aborted. */
async function ask(question: string): Promise<void> {
  await follow((ready, signal) => {
    chat ??= ready.conversation();
    const isNew = chat.messages.length === 0 && image !== null;
    view.beginAnswer(question);
    return chat.stream(question, { images: isNew ? [image!] : [], ...ONE, signal });
  });
}

/** Show a text as it is generated, unless another one has begun. */
async function follow(
  begin: (vlm: VLM, signal: AbortSignal) => AsyncGenerator<string, Caption>,
): Promise<void> {
  writing.abort();
  const mine = (writing = new AbortController());
  let [begun, made]: [boolean, Caption | null] = [false, null];
  try {
    const ready = await vlm?.catch(() => null); // `load` has shown the error
    if (!ready || mine.signal.aborted) return;
    begun = true;
    const pieces = begin(ready, mine.signal);
    let next = await pieces.next();
    for (; !next.done; next = await pieces.next()) if (mine === writing) view.addPiece(next.value);
    made = next.value;
    if (mine === writing) view.showModel(ready); // its device may have changed
  } catch (error) {
    if (!mine.signal.aborted) view.showError(error);
  } finally {
    if (begun && mine === writing) view.endText(made);
  }
}

function addSamples(): void {
  const all = Object.entries(samples);
  for (const start of SHOWN) {
    const [path, url] = all.find(([name]) => name.includes(`/${start}`)) ?? [];
    if (path === undefined || url === undefined) continue;
    const button = document.createElement('button');
    const image = new Image();
    button.type = 'button';
    image.src = url;
    image.alt = `Example: ${path.replace(/^.*\/|\.png$/g, '').replaceAll('_', ' ')}`;
    button.append(image);
    button.onclick = () => {
      press(button);
      void write(url);
    };
    ui.samples.append(button);
  }
}

function press(pressed: HTMLButtonElement | null): void {
  for (const button of ui.samples.children) {
    button.setAttribute('aria-pressed', String(button === pressed));
  }
}

function take(files: FileList | null | undefined): void {
  const file = files?.[0];
  if (!file) return;
  press(null);
  void write(file);
}

function listen(): void {
  ui.file.onchange = () => {
    take(ui.file.files);
    ui.file.value = ''; // so that the same file can be chosen again
  };
  ui.ask.onsubmit = event => {
    event.preventDefault();
    const question = ui.question.value.trim();
    if (question === '') return;
    ui.question.value = '';
    void ask(question);
  };
  ui.stop.onclick = () => (writing.abort(), loading.abort()); // a complete load stays
  ui.again.onclick = () => void load();
  ui.device.onchange = () => void load();
  ui.forget.onclick = async () => {
    await clearCache(model);
    view.showStatus('The download is deleted. It is fetched again when it is needed.');
  };
  document.addEventListener('paste', event => take(event.clipboardData?.files));
  document.addEventListener('dragover', event => {
    event.preventDefault();
    ui.drop.classList.add('over');
  });
  document.addEventListener('dragleave', event => {
    if (event.relatedTarget === null) ui.drop.classList.remove('over'); // it left the window
  });
  document.addEventListener('drop', event => {
    event.preventDefault();
    ui.drop.classList.remove('over');
    take(event.dataTransfer?.files);
  });
}

ui.device.value = asked.get('device') ?? 'auto';
addSamples();
listen();
void load();
if ('serviceWorker' in navigator && import.meta.env.PROD) {
  void navigator.serviceWorker.register('./sw.js').catch(() => {}); // the page works without it
}
