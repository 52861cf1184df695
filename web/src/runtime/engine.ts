/**
 * A loaded bundle on a device that was tried with the golden input: the state of the worker.
 *
 * 'auto' tries WebGPU first. If the GPU is missing, fails or gives wrong numbers, WebAssembly is
 * used instead, and `reason` says why.
 */

import { type BundleFiles, openBundle } from '../bundle/download.js';
import type { ImageOptions } from '../bundle/manifest.js';
import { choose, precisionName } from '../bundle/precisions.js';
import { bundleAddress, openStore } from '../bundle/store.js';
import { VlmportError, asVlmportError } from '../errors.js';
import type {
  Device,
  GeneratedResponse,
  LoadOptions,
  ModelInfo,
  NumberedImage,
  Progress,
  Question,
} from '../protocol.js';
import { ConversationCache, ConversationCaches } from './conversation-caches.js';
import { snakeCase } from './decoding/foreign-options.js';
import { type Defaults, type OnLeftOut, merged } from './decoding/options.js';
import { Components, graphFiles } from './graphs/components.js';
import { Runtime } from './graphs/sessions.js';
import { FeatureCache, MAX_BYTES, type PromptImage } from './images/features.js';
import { Preparer, type ProcessedQuestion } from './preparing.js';
import { probe } from './probe.js';
import { Prompter, promptFiles } from './prompt.js';
import { checkDefault } from './request.js';
import type { ResponseOptions } from './response.js';

const HALF = /f(p)?16$/; // precisions that compute in 16 bits

type OnProgress = (progress: Progress) => void;
type OnChange = (info: ModelInfo) => void;

interface Listeners {
  readonly onPiece: (text: string) => void;
  /** Called when another device has taken over. */
  readonly onChange: OnChange;
}

interface Ready {
  readonly preparer: Preparer;
  readonly probed: boolean;
}

export class Engine {
  /** The runtime that replaces a failed GPU, until its graphs are open. */
  private next: Runtime | null = null;
  private readonly conversations = new ConversationCaches();

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
    const features = new FeatureCache(options.imageCacheBytes ?? MAX_BYTES);
    const load = (on: Runtime) => loadOn(on, files, options, features, onProgress, signal);
    const wanted: Device = options.device === 'auto' ? 'webgpu' : options.device;
    let runtime: Runtime | null = null;
    try {
      runtime = await Runtime.start(wanted, options);
      return new Engine(options, files, await load(runtime), null);
    } catch (error) {
      signal.throwIfAborted();
      const cause = asVlmportError(error, 'DeviceError');
      if (options.device !== 'auto' || cause.kind !== 'DeviceError') throw cause;
      const host = runtime ? runtime.withoutGpu() : await Runtime.start('wasm', options);
      const reason = `WebGPU is not used: ${cause.message}`;
      try {
        return new Engine(options, files, await load(host), reason);
      } catch (error) {
        signal.throwIfAborted();
        const { kind, message, hint, code } = asVlmportError(error, 'DeviceError');
        const text = kind === 'DeviceError' ? `${message}. ${reason}` : message;
        throw new VlmportError(kind, code, text, hint);
      }
    }
  }

  get info(): ModelInfo {
    const { preparer, probed } = this.ready;
    const { components, prompter } = preparer;
    const { manifest, store } = this.files;
    const { device, threads } = components.runtime;
    const { precision } = components;
    const notes = [];
    if (!globalThis.crossOriginIsolated) {
      notes.push('one thread: the page is not cross-origin isolated (COOP and COEP headers)');
    }
    if (store.problem) notes.push(store.problem);
    if (!probed) notes.push(`not probed: the bundle has no recorded results for ${precision}`);
    const defaults = servedDefaults(components, note => notes.push(note));
    return {
      name: manifest.name,
      device,
      precision,
      threads,
      reason: this.reason,
      notes,
      takesQuestions: prompter.takesQuestions,
      caption: manifest.prompt.caption,
      imageOptions: Object.keys(manifest.image_options ?? {}),
      defaults,
    };
  }

  /**
   * Generate the answer of a question. If the GPU fails before the first piece, WebAssembly takes
   * over.
   *
   * Throws ImageError, OptionError, PromptError, BundleError or DeviceError, or the abort.
   */
  async generate(
    { conversation, images: numbered, imageOptions, ...question }: Question,
    listeners: Listeners,
    signal: AbortSignal,
  ): Promise<GeneratedResponse> {
    const start = performance.now();
    const cache =
      conversation === null ? new ConversationCache() : this.conversations.of(conversation);
    try {
      if (this.next) await this.takeOver(this.next, listeners.onChange, signal);
      const { components } = this.ready.preparer;
      components.checkImageOptions(imageOptions); // also for a question without images
      const images: PromptImage[] = [];
      for (const one of numbered) {
        images.push(await this.image(cache, one, { ...imageOptions, ...one.options }, signal));
      }
      const numbers = numbered.map(one => one.number);
      return await this.withFallback({ ...question, images }, numbers, cache, listeners, {
        start,
        signal,
      });
    } finally {
      if (conversation === null) cache.dispose();
    }
  }

  /** Read and process an image for a later question. Throws ImageError or OptionError, or the
   * abort. */
  async attach(
    conversation: number,
    image: NumberedImage,
    options: ImageOptions,
    { onChange }: Pick<Listeners, 'onChange'>,
    signal: AbortSignal,
  ): Promise<void> {
    if (this.next) await this.takeOver(this.next, onChange, signal);
    await this.image(this.conversations.of(conversation), image, options, signal);
  }

  /** Remove some images of a conversation or all of it; without a conversation, empty the cache of
   * recently encoded images. */
  forget(conversation: number | null, numbers: readonly number[] | null): void {
    if (conversation === null) this.ready.preparer.features.clear();
    else this.conversations.forget(conversation, numbers);
  }

  /** Return an image of a conversation. It is read and processed where its number is new. */
  private async image(
    { images }: ConversationCache,
    { number, image }: NumberedImage,
    options: ImageOptions,
    signal: AbortSignal,
  ): Promise<PromptImage> {
    const known = images.get(number);
    if (known) return known;
    if (image === null) {
      const message = `no image ${number}`;
      throw new VlmportError('WorkerError', 'program.defect', message, 'please report this');
    }
    const { features, components } = this.ready.preparer;
    const processed = await features.process(components, image, options, signal);
    signal.throwIfAborted();
    images.set(number, processed);
    return processed;
  }

  private async withFallback(
    question: ProcessedQuestion,
    numbers: readonly number[],
    cache: ConversationCache,
    listeners: Listeners,
    options: Omit<ResponseOptions, 'onPiece'>,
  ): Promise<GeneratedResponse> {
    const { signal } = options;
    let hasPieces = false;
    const onPiece = (text: string) => ((hasPieces = true), listeners.onPiece(text));
    const attempt = async () => {
      const { preparer } = this.ready;
      const { components, prompter } = preparer;
      const reusable = cache.reusableBy(components);
      const prepared = await preparer.assemble(question, reusable, signal);
      prepared.images.forEach((image, i) => cache.images.set(numbers[i]!, image));
      return cache.respond(prepared, components, prompter, { ...options, onPiece });
    };
    try {
      return await attempt();
    } catch (error) {
      const cause = asVlmportError(error, 'DeviceError');
      const isLast = this.options.device !== 'auto' || this.info.device === 'wasm';
      if (signal.aborted || isLast || cause.kind !== 'DeviceError') throw error;
      await this.leaveGpu(cause, listeners.onChange, signal);
      if (hasPieces) {
        const hint = 'try again: WebAssembly is used now';
        throw new VlmportError('DeviceError', cause.code, cause.message, hint);
      }
      return attempt();
    }
  }

  private async leaveGpu(cause: VlmportError, onChange: OnChange, signal: AbortSignal) {
    const { components } = this.ready.preparer;
    await components.dispose().catch(() => undefined); // it may fail on a lost device
    this.reason = `WebGPU failed while it ran: ${cause.message}`;
    this.next = components.runtime.withoutGpu();
    await this.takeOver(this.next, onChange, signal);
  }

  /**
   * Open the graphs on another runtime. If that is aborted or fails, the next question tries again.
   */
  private async takeOver(host: Runtime, onChange: OnChange, signal: AbortSignal): Promise<void> {
    const { features } = this.ready.preparer;
    this.ready = await loadOn(host, this.files, this.options, features, () => {}, signal);
    this.next = null;
    onChange(this.info);
  }
}

/**
 * Fetch, open and try the bundle on one device. Throws DeviceError where it gives wrong results.
 */
async function loadOn(
  runtime: Runtime,
  files: BundleFiles,
  options: LoadOptions,
  features: FeatureCache,
  onProgress: OnProgress,
  signal: AbortSignal,
): Promise<Ready> {
  files.signal = signal;
  const { manifest } = files;
  const choice = choose(manifest, options.precision, runtime.device);
  const half = Object.values(choice).find(precision => HALF.test(precision));
  if (half !== undefined && !runtime.hasFloat16) {
    const message = `the GPU can't compute ${half}: it has no 16-bit shaders`;
    throw new VlmportError(
      'DeviceError',
      'device.wrong-precision',
      message,
      "use precision: 'auto'",
    );
  }
  const paths = graphFiles(manifest, choice).flatMap(one => one.paths);
  const totalBytes = [...paths, ...promptFiles(manifest)].reduce(
    (n, path) => n + files.size(path),
    0,
  );
  let loadedBytes = 0;
  const report = (phase: Progress['phase'], name: string) =>
    onProgress({ phase, name, loadedBytes, totalBytes });
  files.onBytes = bytes => {
    loadedBytes += bytes;
    report('download', manifest.name);
  };
  const prompter = await Prompter.open(files);
  const onOpen = (name: string) => report('open', name);
  const textOf = (token: number) => prompter.tokenizer.id_to_token(token);
  const components = await Components.open(runtime, files, choice, onOpen, textOf);
  try {
    report('probe', runtime.device);
    const expected = manifest.golden.expected[precisionName(choice)];
    const problems = expected
      ? await probe(components, manifest.golden, expected, signal)
      : unrecorded(runtime.device, components.precision);
    if (problems.length) throw untrusted(runtime.device, problems);
    report('ready', manifest.name);
    const preparer = new Preparer(components, prompter, features);
    return { preparer, probed: expected !== undefined };
  } catch (error) {
    await components.dispose();
    throw error;
  }
}

/**
 * Select the defaults of generation_config.json that these graphs can serve. `onLeftOut` is told of
 * each other one that would have an effect.
 */
function servedDefaults(components: Components, onLeftOut: OnLeftOut): Defaults {
  const { defaults } = components.manifest.generation;
  const left = new Set<string>();
  const check = (name: string, value: unknown) => {
    try {
      checkDefault(components, name, value);
    } catch (error) {
      left.add(snakeCase(name));
      throw error;
    }
  };
  merged(defaults, {}, check, onLeftOut);
  return Object.fromEntries(Object.entries(defaults).filter(([name]) => !left.has(name)));
}

/** A precision that was not recorded is refused on WebGPU, because graphics drivers differ. */
function unrecorded(device: Device, precision: string): string[] {
  return device === 'wasm' ? [] : [`the bundle has no recorded results for precision ${precision}`];
}

function untrusted(device: Device, problems: readonly string[]): VlmportError {
  const message = `${device} gives other results than the recorded ones: ${problems.join('; ')}`;
  const hint = device === 'webgpu' ? "use device: 'wasm'" : 'export the bundle again';
  return new VlmportError('DeviceError', 'device.wrong-numbers', message, hint);
}
