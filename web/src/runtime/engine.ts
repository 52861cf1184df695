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
import type { ImageOptions } from '../bundle/manifest.js';
import type { Asked, Device, Info, LoadOptions, NumberedPicture, Progress } from '../protocol.js';
import { type Answered, type Question, answer } from './preparing.js';
import { Components, graphFiles } from './graphs/components.js';
import { Conversation, Conversations } from './conversations.js';
import { FeatureCache, MAX_BYTES, type Picture } from './images/features.js';
import { notFollowed } from './generate.js';
import { probe } from './probe.js';
import { Prompter, promptFiles } from './prompt.js';
import { Runtime } from './graphs/sessions.js';

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
  private readonly features: FeatureCache;
  private readonly conversations = new Conversations();

  private constructor(
    private readonly options: LoadOptions,
    private readonly files: BundleFiles,
    private ready: Ready,
    private reason: string | null,
  ) {
    this.features = new FeatureCache(options.imageCacheBytes ?? MAX_BYTES);
  }

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
      if (options.device !== 'auto' || cause.kind !== 'DeviceError') throw cause;
      const host = runtime ? runtime.withoutGpu() : await Runtime.start('wasm', options);
      const reason = `WebGPU is not used: ${cause.message}`;
      try {
        const ready = await loadOn(host, files, options, onProgress, signal);
        return new Engine(options, files, ready, reason);
      } catch (error) {
        signal.throwIfAborted();
        const { kind, message, hint, code } = asVlmportError(error, 'DeviceError');
        const text = kind === 'DeviceError' ? `${message}. ${reason}` : message;
        throw new VlmportError(kind, code, text, hint);
      }
    }
  }

  get info(): Info {
    const { components, prompter, probed } = this.ready;
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
      takesQuestions: prompter.takesQuestions,
      caption: this.files.manifest.prompt.caption,
      imageOptions: Object.keys(this.files.manifest.image_options ?? {}),
    };
  }

  /**
   * Answer a prompt. Where the GPU fails before the first piece, WebAssembly takes over; `onChange`
   * is then called.
   *
   * Throws ImageError, OptionError, PromptError, BundleError or DeviceError, or the abort.
   */
  async answer(
    asked: Asked,
    hear: { onPiece: (text: string) => void; onChange: OnChange },
    signal: AbortSignal,
  ): Promise<Answered> {
    const start = performance.now();
    const { conversation: number, messages, maxNewTokens, skipSpecialTokens } = asked;
    const own = number === null ? new Conversation() : this.conversations.of(number);
    try {
      if (this.next) await this.takeOver(this.next, hear.onChange, signal);
      this.ready.components.checkImageOptions(asked.imageOptions); // where there is no picture too
      const pictures: Picture[] = [];
      for (const one of asked.pictures) {
        const options = { ...asked.imageOptions, ...one.options };
        pictures.push(await this.picture(own, one, options, signal));
      }
      const { leavesRoom, alone } = asked;
      const how = { maxNewTokens, skipSpecialTokens, leavesRoom, alone };
      const question = { messages, pictures, ...how };
      const onEncoded = (encoded: readonly Picture[]) =>
        encoded.forEach((picture, i) => own.pictures.set(asked.pictures[i]!.number, picture));
      return await this.withFallback(question, own, { ...hear, onEncoded, start }, signal);
    } finally {
      if (number === null) own.dispose();
    }
  }

  /** Read a picture for a question to come. Throws ImageError or OptionError, or the abort. */
  async attach(
    conversation: number,
    picture: NumberedPicture,
    options: ImageOptions,
    { onChange }: { onChange: OnChange },
    signal: AbortSignal,
  ): Promise<void> {
    if (this.next) await this.takeOver(this.next, onChange, signal);
    await this.picture(this.conversations.of(conversation), picture, options, signal);
  }

  /** Forget some pictures of a conversation or all of it; with no conversation, features. */
  forget(conversation: number | null, numbers: readonly number[] | null): void {
    if (conversation === null) this.features.clear();
    else this.conversations.forget(conversation, numbers);
  }

  /** A picture of a conversation: read and cut, known by its number from here on. */
  private async picture(
    { pictures }: Conversation,
    { number, picture }: NumberedPicture,
    options: ImageOptions,
    signal: AbortSignal,
  ): Promise<Picture> {
    const known = pictures.get(number);
    if (known) return known;
    if (picture === null) {
      throw new VlmportError(
        'WorkerError',
        'program.defect',
        `no picture ${number}`,
        'please report this',
      );
    }
    const read = await this.features.process(this.ready.components, picture, options, signal);
    signal.throwIfAborted();
    pictures.set(number, read);
    return read;
  }

  private async withFallback(
    question: Question,
    own: Conversation,
    hear: Parameters<typeof answer>[3] & { onChange: OnChange },
    signal: AbortSignal,
  ): Promise<Answered> {
    let said = false;
    const onPiece = (text: string) => ((said = true), hear.onPiece(text));
    const attempt = () => {
      const model = { ...this.ready, features: this.features };
      return answer(model, question, own, { ...hear, onPiece }, signal);
    };
    try {
      return await attempt();
    } catch (error) {
      const cause = asVlmportError(error, 'DeviceError');
      const hopeless = this.options.device !== 'auto' || this.info.device === 'wasm';
      if (signal.aborted || hopeless || cause.kind !== 'DeviceError') throw error;
      await this.leaveGpu(cause, hear.onChange, signal);
      if (said)
        throw new VlmportError(
          'DeviceError',
          cause.code,
          cause.message,
          'try again: now on WebAssembly',
        );
      return attempt();
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
    throw new VlmportError(
      'DeviceError',
      'device.wrong-precision',
      message,
      "precision: 'auto' takes one that it can",
    );
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
  const onOpen = (name: string) => tell('open', name);
  const textOf = (token: number) => prompter.tokenizer.id_to_token(token);
  const components = await Components.open(runtime, files, choice, onOpen, textOf);
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
  return new VlmportError('DeviceError', 'device.wrong-numbers', message, hint);
}
