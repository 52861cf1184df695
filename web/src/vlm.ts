/** `VLM`: load a bundle, ask it about pictures. */

import { wholeAddress } from './address.js';
import { bundleAddress } from './bundle/store.js';
import { type Caption, whole } from './caption.js';
import { Conversation, type ConversationOptions } from './conversation.js';
import { VlmportError, firstLine } from './errors.js';
import { Link } from './link.js';
import { type Message, checkMessages } from './messages.js';
import { Model } from './model.js';
import {
  type CaptionOptions,
  type GenerateOptions,
  checkAnswerOptions,
  checkCount,
  checkNames,
} from './options.js';
import { type PictureSource, toPicture } from './picture.js';
import type { Device, Info, LoadOptions, Progress } from './protocol.js';

export interface VlmOptions {
  /** 'auto' takes WebGPU where it gives right results, else WebAssembly. */
  device?: 'auto' | Device;
  /** 'auto' (the bundle's choice for the device), 'fp32', 'q4', … or 'vision=q4,decoder=fp32'. */
  precision?: string;
  onProgress?: (progress: Progress) => void;
  signal?: AbortSignal;
  /** Threads on WebAssembly; more than one needs a cross-origin isolated page. */
  threads?: number;
  /** Where ONNX Runtime's .wasm and .mjs files lie, where a bundler does not see to that. */
  wasmPaths?: string;
  /**
   * Maximum size of the cache of encoded pictures (default 64 MB, 0 = none): a picture in it is not
   * encoded again. The least recently used go first.
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
   * Load a bundle from its address, a folder with a vlmport.json.
   *
   * Throws VlmportError, or the signal's reason.
   */
  static async load(url: string | URL, options: VlmOptions = {}): Promise<VLM> {
    const checked = checkLoadOptions(url, options);
    const link = new Link();
    let info: Info | null = null;
    // The worker hears nothing while ONNX Runtime waits for a file or opens a graph: it is ended.
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

  /** The precision in use, or the mix. */
  get precision(): string {
    return this.model.info.precision;
  }

  get threads(): number {
    return this.model.info.threads;
  }

  /** Why this device and not another, in plain words; null where it is the one asked for. */
  get reason(): string | null {
    return this.model.info.reason;
  }

  /** What else a person may want to know: one thread only, nothing kept, … */
  get notes(): readonly string[] {
    return this.model.info.notes;
  }

  /** Whether the model answers questions; else it captions pictures and refuses words. */
  get takesQuestions(): boolean {
    return this.model.info.takesQuestions;
  }

  /** Caption one picture. Throws VlmportError, or the signal's reason. */
  async caption(image: PictureSource, options: CaptionOptions = {}): Promise<Caption> {
    return whole(this.stream(image, options));
  }

  /**
   * Answer messages. Each part `{ type: 'image' }` without a picture takes the next of `images`.
   *
   * Throws VlmportError, or the signal's reason.
   */
  async generate(messages: readonly Message[], options: GenerateOptions = {}): Promise<Caption> {
    checkMessages(messages, options.images, this.model.info.imageOptions); // one picture is no message, though `stream` takes it
    return whole(this.stream(messages, options));
  }

  /**
   * The caption of a picture, or the answer to messages, piece by piece as it is made; the generator
   * returns the whole.
   *
   * All pieces together are the text that `caption` or `generate` gives. Leaving the loop ends the
   * generation. What is wrong with the arguments is thrown here, not at the first piece.
   */
  stream(image: PictureSource, options?: CaptionOptions): AsyncGenerator<string, Caption>;
  stream(messages: readonly Message[], options?: GenerateOptions): AsyncGenerator<string, Caption>;
  stream(
    asked: PictureSource | readonly Message[],
    options: GenerateOptions = {},
  ): AsyncGenerator<string, Caption> {
    if (isMessages(asked)) {
      checkAnswerOptions(options, ['imageOptions', 'images']);
      return this.pieces(asked, options);
    }
    checkAnswerOptions(options, ['imageOptions']);
    const caption = this.model.info.caption as readonly Message[];
    return this.pieces(caption, { ...options, images: [asked] });
  }

  /** A conversation that begins with nothing but, perhaps, a system message. */
  conversation(options: ConversationOptions = {}): Conversation {
    return new Conversation(this.model, options);
  }

  /** Empty the cache of recently encoded pictures; conversations keep theirs. */
  forgetPictures(): void {
    this.model.link.post({ type: 'forget', conversation: null, numbers: null });
  }

  /** End the worker and free all memory. What still runs fails with a WorkerError. */
  dispose(): void {
    this.model.link.close();
  }

  private pieces(
    asked: readonly Message[],
    { images, imageOptions = {}, maxNewTokens, skipSpecialTokens = true, signal }: GenerateOptions,
  ): AsyncGenerator<string, Caption> {
    const { model } = this;
    const chat = checkMessages(asked, images, model.info.imageOptions);
    const { messages, pictures: sources, options } = chat;
    return (async function* () {
      signal?.throwIfAborted();
      const read = await Promise.all(sources.map(source => toPicture(source)));
      const pictures = read.map((picture, number) => {
        return { number, picture, options: options[number]! };
      });
      const most = maxNewTokens ?? null;
      const how = {
        imageOptions,
        maxNewTokens: most,
        skipSpecialTokens,
        leavesRoom: false,
        alone: null,
      };
      return yield* model.stream({ messages, pictures, ...how, conversation: null }, signal);
    })();
  }
}

const isMessages = (asked: PictureSource | readonly Message[]): asked is readonly Message[] =>
  Array.isArray(asked);

function checkLoadOptions(url: string | URL, options: VlmOptions): LoadOptions {
  checkNames(options, VLM_OPTIONS);
  const { device = 'auto', precision = 'auto', threads, wasmPaths, imageCacheBytes } = options;
  if (!['auto', 'webgpu', 'wasm'].includes(device)) {
    const message = `device '${device}' is unknown`;
    throw new VlmportError('OptionError', 'device.unknown', message, "'auto', 'webgpu' or 'wasm'");
  }
  if (typeof precision !== 'string') {
    const message = `precision ${String(precision)} is no text`;
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
