/**
 * A bundle, loaded on a device that was tried: what the worker holds.
 *
 * 'auto' tries WebGPU first. A device that is not there, fails or gives wrong numbers is left for
 * WebAssembly, and the reason is kept in plain words.
 */

import { type BundleFiles, openBundle } from '../bundle/download.js';
import { choose, precisionName } from '../bundle/precisions.js';
import { bundleAddress, openStore } from '../bundle/store.js';
import { VlmportError, asVlmportError } from '../errors.js';
import type {
  CaptionData,
  CaptionOptions,
  Device,
  Info,
  LoadOptions,
  Picture,
  Progress,
} from '../protocol.js';
import { Components, type ProcessedImage, graphFiles } from './components.js';
import { generate, notFollowed } from './generate.js';
import { openImage } from './images.js';
import { probe } from './probe.js';
import { Prompter, promptFiles } from './prompt.js';
import { Runtime } from './sessions.js';
import { TextStream } from './text.js';

const HALF = /f(p)?16$/; // precisions that compute in 16 bits

type OnProgress = (progress: Progress) => void;
type OnChange = (info: Info) => void;

interface Ready {
  readonly components: Components;
  readonly prompter: Prompter;
  readonly probed: boolean;
}

export class Engine {
  /** The GPU was left for this, which holds no graphs yet; null once it does. */
  private next: Runtime | null = null;

  private constructor(
    private readonly options: LoadOptions,
    private readonly files: BundleFiles,
    private ready: Ready,
    private reason: string | null,
  ) {}

  /** Throws BundleError, DownloadError, TokenizerError or DeviceError, or the abort. */
  static async open(
    options: LoadOptions,
    onProgress: OnProgress,
    signal: AbortSignal,
  ): Promise<Engine> {
    const files = await openBundle(bundleAddress(options.url), await openStore(), signal);
    const wanted: Device = options.device === 'auto' ? 'webgpu' : options.device;
    let runtime: Runtime | null = null;
    try {
      runtime = await Runtime.start(wanted, options);
      const ready = await loadOn(runtime, files, options, onProgress, signal);
      return new Engine(options, files, ready, null);
    } catch (error) {
      signal.throwIfAborted();
      const cause = asVlmportError(error, 'DeviceError');
      if (options.device !== 'auto' || cause.code !== 'DeviceError') throw cause;
      const host = runtime ? runtime.withoutGpu() : await Runtime.start('wasm', options);
      const ready = await loadOn(host, files, options, onProgress, signal);
      return new Engine(options, files, ready, `WebGPU is not used: ${cause.message}`);
    }
  }

  get info(): Info {
    const { components, probed } = this.ready;
    const { device, threads } = components.runtime;
    const notes = [];
    if (!globalThis.crossOriginIsolated) {
      notes.push('one thread: the page is not cross-origin isolated (COOP and COEP headers)');
    }
    if (this.files.store.problem) notes.push(this.files.store.problem);
    if (!probed) notes.push(`not probed: nothing is recorded for ${components.precision}`);
    const idle = notFollowed(this.files.manifest.generation.defaults);
    if (idle.length)
      notes.push(`greedy decoding: the model's own ${idle.join(', ')} are not there yet`);
    const { precision } = components;
    return {
      name: this.files.manifest.name,
      device,
      precision,
      threads,
      reason: this.reason,
      notes,
    };
  }

  /**
   * Caption one picture. Where the GPU fails before the first piece, WebAssembly takes over;
   * `onChange` is then called.
   *
   * Throws ImageError, PromptError or DeviceError, or the abort.
   */
  async caption(
    picture: Picture,
    options: CaptionOptions,
    hear: { onPiece: (text: string) => void; onChange: OnChange },
    signal: AbortSignal,
  ): Promise<CaptionData> {
    const start = performance.now();
    const open = await opened(picture, signal);
    if (this.next) await this.takeOver(this.next, hear.onChange, signal);
    let said = false;
    const onPiece = (text: string) => ((said = true), hear.onPiece(text));
    try {
      return await caption(this.ready, open, options, { onPiece, start }, signal);
    } catch (error) {
      const cause = asVlmportError(error, 'DeviceError');
      const hopeless = this.options.device !== 'auto' || this.info.device === 'wasm';
      if (signal.aborted || hopeless || cause.code !== 'DeviceError') throw error;
      await this.leaveGpu(cause, hear.onChange, signal);
      if (said)
        throw new VlmportError('DeviceError', cause.message, 'try again: now on WebAssembly');
      return caption(this.ready, open, options, { onPiece, start }, signal);
    }
  }

  private async leaveGpu(cause: VlmportError, onChange: OnChange, signal: AbortSignal) {
    const { components } = this.ready;
    await components.dispose().catch(() => undefined); // a lost device may refuse that
    this.reason = `WebGPU failed while it ran: ${cause.message}`;
    this.next = components.runtime.withoutGpu();
    await this.takeOver(this.next, onChange, signal);
  }

  /** Where this is given up or fails, the next caption begins with it. */
  private async takeOver(host: Runtime, onChange: OnChange, signal: AbortSignal): Promise<void> {
    this.ready = await loadOn(host, this.files, this.options, () => {}, signal);
    this.next = null;
    onChange(this.info);
  }
}

/** Fetch, open and try the bundle on one device. Throws DeviceError where it can't be trusted. */
async function loadOn(
  runtime: Runtime,
  files: BundleFiles,
  options: LoadOptions,
  onProgress: OnProgress,
  signal: AbortSignal,
): Promise<Ready> {
  files.signal = signal;
  const { manifest } = files;
  const choice = choose(manifest, options.precision, runtime.device);
  const half = Object.values(choice).find(precision => HALF.test(precision));
  if (half !== undefined && !runtime.hasFloat16) {
    const message = `the GPU can't compute ${half}: it has no 16-bit shaders`;
    throw new VlmportError('DeviceError', message, "precision: 'auto' takes one that it can");
  }
  const paths = graphFiles(manifest, choice).flatMap(one => one.paths);
  const totalBytes = [...paths, ...promptFiles(manifest)].reduce(
    (n, path) => n + files.size(path),
    0,
  );
  let loadedBytes = 0;
  const tell = (phase: Progress['phase'], name: string) =>
    onProgress({ phase, name, loadedBytes, totalBytes });
  files.onBytes = bytes => {
    loadedBytes += bytes;
    tell('download', manifest.name);
  };
  const prompter = await Prompter.open(files);
  const components = await Components.open(runtime, files, choice, name => tell('open', name));
  try {
    tell('probe', runtime.device);
    const expected = manifest.golden.expected[precisionName(choice)];
    const problems = expected
      ? await probe(components, manifest.golden, expected, signal)
      : unrecorded(runtime.device, components.precision);
    if (problems.length) throw untrusted(runtime.device, problems);
    tell('ready', manifest.name);
    return { components, prompter, probed: expected !== undefined };
  } catch (error) {
    await components.dispose();
    throw error;
  }
}

/** Graphics drivers differ too much to be trusted unseen; WebAssembly is one program everywhere. */
function unrecorded(device: Device, precision: string): string[] {
  return device === 'wasm' ? [] : [`the bundle records nothing for precision ${precision}`];
}

function untrusted(device: Device, problems: readonly string[]): VlmportError {
  const message = `${device} gives other results than recorded: ${problems.join('; ')}`;
  const hint = device === 'webgpu' ? "device: 'wasm' works" : 'export the bundle again';
  return new VlmportError('DeviceError', message, hint);
}

type Opened = (components: Components) => Promise<ProcessedImage>;

/** A picture that was read once, whichever device it then runs on. */
async function opened(picture: Picture, signal: AbortSignal): Promise<Opened> {
  if (picture.kind === 'values') {
    const { dims, data } = picture;
    return components => components.processValues(dims, data);
  }
  const rgb = await openImage(picture, signal);
  return components => components.processImage(rgb);
}

/** Template → ids with pictures spliced in → embeddings with features over image rows → text. */
async function caption(
  { components, prompter }: Ready,
  open: Opened,
  options: CaptionOptions,
  { onPiece, start }: { onPiece: (text: string) => void; start: number },
  signal: AbortSignal,
): Promise<CaptionData> {
  const { prompt, generation, dims } = components.manifest;
  const asked = prompter.encode(prompter.render(prompt.caption));
  const processed = await open(components);
  const ids = prompter.splice(asked, [processed.promptIds]);
  const room = dims.context_length - ids.length + 1;
  if (!ids.length || room < 2) {
    const message = `the prompt has ${ids.length} tokens, the model's context is ${dims.context_length}`;
    throw new VlmportError('PromptError', message, 'a smaller picture may fit');
  }
  const features = await components.encodeImage(processed, signal);
  const encoded = performance.now();
  const embeds = await components.embedPrompt(ids, [features]);
  const maxNewTokens = Math.min(options.maxNewTokens ?? generation.max_new_tokens, room);
  const stopTokenIds = new Set(generation.stop_token_ids);
  const tokenIds: number[] = [];
  const text = new TextStream(prompter.tokenizer);
  const say = (piece: string) => piece && onPiece(piece);
  let first = encoded;
  for await (const { token } of generate(components, embeds, {
    maxNewTokens,
    stopTokenIds,
    signal,
  })) {
    if (tokenIds.push(token) === 1) first = performance.now();
    if (!stopTokenIds.has(token)) say(text.push(token));
  }
  say(text.finish());
  const seconds = (from: number, to: number) => (to - from) / 1000;
  return {
    text: text.whole(),
    tokenIds,
    stopReason: stopTokenIds.has(tokenIds.at(-1) ?? -1) ? 'stop' : 'length',
    timings: {
      image: seconds(start, encoded),
      prefill: seconds(encoded, first),
      decode: seconds(first, performance.now()),
    },
    counts: {
      promptTokens: ids.length,
      imageTokens: features.count,
      newTokens: tokenIds.length,
    },
  };
}
