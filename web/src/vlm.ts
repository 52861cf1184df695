/** `VLM`: load a bundle, caption images, answer messages. */

import { wholeAddress } from './address.js';
import { bundleAddress } from './bundle/store.js';
import { type Caption, whole } from './caption.js';
import { Conversation, type ConversationOptions } from './conversation.js';
import { VlmportError, firstLine, quoted } from './errors.js';
import { type ImageSource, toSentImage } from './image-source.js';
import { Link } from './link.js';
import { type Message, checkMessages } from './messages.js';
import { Model } from './model.js';
import {
  type CaptionOptions,
  type GenerateOptions,
  checkCount,
  checkNames,
  decodingOptions,
  refuseSeveral,
} from './options.js';
import type { Device, LoadOptions, ModelInfo, Progress } from './protocol.js';
import type { GenerationOptions } from './runtime/decoding/options.js';

export interface VlmOptions {
  /** 'auto' (default) uses WebGPU where it gives right results, else WebAssembly. */
  device?: 'auto' | Device;
  /** 'auto' (default: the bundle's choice for the device), 'fp32', 'q4', … or
   * 'vision=q4,decoder=fp32'. */
  precision?: string;
  onProgress?: (progress: Progress) => void;
  signal?: AbortSignal;
  /** Number of threads on WebAssembly; more than one needs a cross-origin isolated page. */
  threads?: number;
  /** The folder of ONNX Runtime's .wasm and .mjs files, where no bundler handles them. */
  wasmPaths?: string;
  /**
   * Maximum size of the cache of encoded images (default 64 MB, 0 = none). An image in it is not
   * encoded again; the least recently used image is removed first.
   */
  imageCacheBytes?: number;
}

const VLM_OPTIONS = [
  'device',
  'precision',
  'onProgress',
  'signal',
  'threads',
  'wasmPaths',
  'imageCacheBytes',
];

export class VLM {
  private constructor(private readonly model: Model) {}

  /**
   * Load a bundle from its address: a folder with a vlmport.json.
   *
   * Throws VlmportError, or the signal's reason.
   */
  static async load(url: string | URL, options: VlmOptions = {}): Promise<VLM> {
    const checked = checkLoadOptions(url, options);
    const link = new Link();
    let info: ModelInfo | null = null;
    // An abort ends the worker: it receives no message while ONNX Runtime waits for a file or opens
    // a graph.
    const abort = () => link.close();
    options.signal?.addEventListener('abort', abort);
    try {
      await link.request(
        { type: 'load', options: checked },
        reply => {
          if (reply.type === 'progress') options.onProgress?.(reply.progress);
          if (reply.type === 'loaded') info = reply.info;
          return info !== null;
        },
        { signal: options.signal },
      );
      return new VLM(new Model(link, info!));
    } catch (error) {
      link.close();
      throw error;
    } finally {
      options.signal?.removeEventListener('abort', abort);
    }
  }

  /** The model's name. */
  get name(): string {
    return this.model.info.name;
  }

  get device(): Device {
    return this.model.info.device;
  }

  /** The precision in use, or a mix such as 'vision_encoder=q4,decoder_model_merged=fp32'. */
  get precision(): string {
    return this.model.info.precision;
  }

  get threads(): number {
    return this.model.info.threads;
  }

  /** Why another device than the requested one is used, in plain words; null where it is not. */
  get reason(): string | null {
    return this.model.info.reason;
  }

  /** Limits that the user may want to know: one thread only, nothing kept, … */
  get notes(): readonly string[] {
    return this.model.info.notes;
  }

  /** Whether the model answers questions; else it captions images only. */
  get takesQuestions(): boolean {
    return this.model.info.takesQuestions;
  }

  /** Caption one image. Throws VlmportError, or the signal's reason. */
  async caption(image: ImageSource, options: CaptionOptions = {}): Promise<Caption> {
    return whole(this.answer(image, options));
  }

  /**
   * Caption images one after the other, and continue after a bad one.
   *
   *     for await (const result of vlm.captionEach(files)) console.log(String(result));
   *
   * The images may be any iterable, also one that is read as it goes. There is one result for each
   * image, in order: a Caption, or the VlmportError (of kind ImageError or PromptError) that says
   * why this image has none. Wrong options throw here, not at the first caption.
   */
  captionEach(
    images: Iterable<ImageSource> | AsyncIterable<ImageSource>,
    options: CaptionOptions = {},
  ): AsyncGenerator<Caption | VlmportError, void, undefined> {
    decodingOptions(this.model.info, options, ['imageOptions']);
    return this.captions(images, options);
  }

  private async *captions(
    images: Iterable<ImageSource> | AsyncIterable<ImageSource>,
    options: CaptionOptions,
  ): AsyncGenerator<Caption | VlmportError, void, undefined> {
    for await (const image of images) {
      try {
        yield await this.caption(image, options);
      } catch (error) {
        const isBad =
          error instanceof VlmportError && ['ImageError', 'PromptError'].includes(error.kind);
        if (!isBad) throw error;
        yield error;
      }
    }
  }

  /**
   * Answer messages. Each part `{ type: 'image' }` without an image takes the next of `images`.
   *
   * Throws VlmportError, or the signal's reason.
   */
  async generate(messages: readonly Message[], options: GenerateOptions = {}): Promise<Caption> {
    // An image is refused here, though `stream` takes one.
    checkMessages(messages, options.images, this.model.info.imageOptions);
    return whole(this.answer(messages, options));
  }

  /**
   * Stream the caption of an image, or the answer to messages, piece by piece; the generator
   * returns the whole response.
   *
   * All pieces together are the text that `caption` or `generate` gives. Leaving the loop ends the
   * generation. Wrong arguments throw here, not at the first piece, and so do options that ask for
   * several sequences: which is best is known only at the end.
   */
  stream(image: ImageSource, options?: CaptionOptions): AsyncGenerator<string, Caption>;
  stream(messages: readonly Message[], options?: GenerateOptions): AsyncGenerator<string, Caption>;
  stream(
    input: ImageSource | readonly Message[],
    options: GenerateOptions = {},
  ): AsyncGenerator<string, Caption> {
    return this.answer(input, options, refuseSeveral);
  }

  /** Stream an answer; one of several sequences has no pieces. */
  private answer(
    input: ImageSource | readonly Message[],
    options: GenerateOptions,
    check: (options: GenerationOptions) => void = () => {},
  ): AsyncGenerator<string, Caption> {
    const { info } = this.model;
    if (isMessages(input)) {
      const decoding = decodingOptions(info, options, ['imageOptions', 'images']);
      check(decoding);
      return this.pieces(input, options, decoding);
    }
    const decoding = decodingOptions(info, options, ['imageOptions']);
    check(decoding);
    const caption = info.caption as readonly Message[];
    return this.pieces(caption, { ...options, images: [input] }, decoding);
  }

  /** Begin a conversation, empty or with a system message. */
  conversation(options: ConversationOptions = {}): Conversation {
    return new Conversation(this.model, options);
  }

  /** Empty the cache of recently encoded images; conversations keep theirs. */
  forgetImages(): void {
    this.model.link.post({ type: 'forget', conversation: null, numbers: null });
  }

  /** @deprecated The former name of `forgetImages`. */
  forgetPictures(): void {
    this.forgetImages();
  }

  /** End the worker and free all memory. Calls that still run fail with a WorkerError. */
  dispose(): void {
    this.model.link.close();
  }

  private pieces(
    given: readonly Message[],
    { images, imageOptions = {}, signal }: GenerateOptions,
    decoding: GenerationOptions,
  ): AsyncGenerator<string, Caption> {
    const { model } = this;
    const { imageOptions: known } = model.info;
    const { messages, images: sources, options } = checkMessages(given, images, known);
    return (async function* () {
      signal?.throwIfAborted();
      const sent = await Promise.all(sources.map(source => toSentImage(source)));
      const question = {
        messages,
        images: sent.map((image, number) => ({ number, image, options: options[number]! })),
        imageOptions,
        options: decoding,
        leavesRoom: false,
        alone: null,
        conversation: null,
      };
      return yield* model.stream(question, signal);
    })();
  }
}

const isMessages = (input: ImageSource | readonly Message[]): input is readonly Message[] =>
  Array.isArray(input);

function checkLoadOptions(url: string | URL, options: VlmOptions): LoadOptions {
  checkNames(options, VLM_OPTIONS);
  const { device = 'auto', precision = 'auto', threads, wasmPaths, imageCacheBytes } = options;
  if (!['auto', 'webgpu', 'wasm'].includes(device)) {
    const message = `device '${device}' is unknown`;
    throw new VlmportError(
      'OptionError',
      'device.unknown',
      message,
      "use 'auto', 'webgpu' or 'wasm'",
    );
  }
  if (typeof precision !== 'string') {
    const message = `precision must be a text, got ${quoted(precision)}`;
    throw new VlmportError('OptionError', 'option.wrong-value', message, "for example 'q8'");
  }
  if (threads !== undefined) checkCount('threads', threads);
  if (imageCacheBytes !== undefined) checkCount('imageCacheBytes', imageCacheBytes, 0);
  return {
    url: bundleAddress(url).href,
    device,
    precision,
    threads: threads ?? null,
    wasmPaths: wasmPaths === undefined ? null : wasmFolder(wasmPaths),
    imageCacheBytes: imageCacheBytes ?? null,
  };
}

function wasmFolder(address: string): string {
  try {
    return wholeAddress(address).href;
  } catch (error) {
    const message = `wasmPaths '${address}' is not a URL (${firstLine(error)})`;
    throw new VlmportError('OptionError', 'option.wrong-value', message, "for example './ort/'");
  }
}
