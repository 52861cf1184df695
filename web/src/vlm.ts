/** `VLM`: load a bundle, ask it about pictures. */

import { wholeAddress } from './address.js';
import { bundleAddress } from './bundle/store.js';
import { VlmportError, didYouMean, firstLine } from './errors.js';
import { Link } from './link.js';
import { type PictureSource, toPicture, transferOf } from './picture.js';
import type { CaptionData, Device, Info, LoadOptions, Progress } from './protocol.js';

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
}

export interface CaptionOptions {
  /** At most so many tokens; the bundle's default without it. */
  maxNewTokens?: number;
  signal?: AbortSignal;
}

const VLM_OPTIONS = ['device', 'precision', 'onProgress', 'signal', 'threads', 'wasmPaths'];
const CAPTION_OPTIONS = ['maxNewTokens', 'signal'];

/** Generated text; `String(caption)` gives it. */
export class Caption implements CaptionData {
  readonly text: string;
  readonly tokenIds: readonly number[];
  readonly stopReason: 'stop' | 'length';
  readonly timings: CaptionData['timings'];
  readonly counts: CaptionData['counts'];

  constructor(data: CaptionData) {
    this.text = data.text;
    this.tokenIds = data.tokenIds;
    this.stopReason = data.stopReason;
    this.timings = data.timings;
    this.counts = data.counts;
  }

  /** Tokens per second, the first left out: it is the prompt's. */
  get tokensPerSecond(): number {
    return this.timings.decode > 0 ? (this.counts.newTokens - 1) / this.timings.decode : 0;
  }

  toString(): string {
    return this.text;
  }
}

export class VLM {
  private constructor(
    private readonly link: Link,
    private info: Info,
  ) {}

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
      return new VLM(link, info!);
    } catch (error) {
      link.close();
      throw error;
    } finally {
      options.signal?.removeEventListener('abort', abort);
    }
  }

  /** The model's name. */
  get name(): string {
    return this.info.name;
  }

  get device(): Device {
    return this.info.device;
  }

  /** The precision in use, or the mix. */
  get precision(): string {
    return this.info.precision;
  }

  get threads(): number {
    return this.info.threads;
  }

  /** Why this device and not another, in plain words; null where it is the one asked for. */
  get reason(): string | null {
    return this.info.reason;
  }

  /** What else a person may want to know: one thread only, nothing kept, … */
  get notes(): readonly string[] {
    return this.info.notes;
  }

  /** Caption one picture. Throws VlmportError, or the signal's reason. */
  async caption(image: PictureSource, options: CaptionOptions = {}): Promise<Caption> {
    const pieces = this.stream(image, options);
    for (;;) {
      const next = await pieces.next();
      if (next.done) return next.value;
    }
  }

  /**
   * The caption of a picture, piece by piece as it is made; the generator returns the whole.
   *
   * All pieces together are the text that `caption` gives. Leaving the loop ends the generation.
   */
  stream(image: PictureSource, options: CaptionOptions = {}): AsyncGenerator<string, Caption> {
    checkCaptionOptions(options);
    return this.pieces(image, options);
  }

  /** End the worker and free all memory. What still runs fails with a WorkerError. */
  dispose(): void {
    this.link.close();
  }

  private async *pieces(
    image: PictureSource,
    { maxNewTokens, signal }: CaptionOptions,
  ): AsyncGenerator<string, Caption> {
    signal?.throwIfAborted();
    const picture = await toPicture(image);
    const left = new AbortController(); // the caller left the loop
    const waiting: string[] = [];
    let caption: Caption | null = null;
    let wake = () => {};
    const finished = this.link.request(
      { type: 'caption', picture, options: { maxNewTokens: maxNewTokens ?? null } },
      reply => {
        if (reply.type === 'piece') waiting.push(reply.text);
        if (reply.type === 'changed') this.info = reply.info;
        if (reply.type === 'captioned') caption = new Caption(reply.caption);
        wake();
        return caption !== null;
      },
      {
        signal: signal ? AbortSignal.any([signal, left.signal]) : left.signal,
        transfer: transferOf(picture),
      },
    );
    finished.catch(() => {}); // heard below
    try {
      while (caption === null) {
        const piece = new Promise<void>(resolve => (wake = resolve));
        await Promise.race([piece, finished]);
        while (waiting.length) yield waiting.shift()!;
      }
      return caption;
    } finally {
      if (caption === null) left.abort();
    }
  }
}

function checkLoadOptions(url: string | URL, options: VlmOptions): LoadOptions {
  checkNames(options, VLM_OPTIONS);
  const { device = 'auto', precision = 'auto', threads, wasmPaths } = options;
  if (!['auto', 'webgpu', 'wasm'].includes(device)) {
    const message = `device '${device}' is unknown`;
    throw new VlmportError('OptionError', message, "'auto', 'webgpu' or 'wasm'");
  }
  if (typeof precision !== 'string') {
    const message = `precision ${String(precision)} is no text`;
    throw new VlmportError('OptionError', message, "for example 'q8'");
  }
  if (threads !== undefined) checkCount('threads', threads);
  return {
    url: bundleAddress(url).href,
    device,
    precision,
    threads: threads ?? null,
    wasmPaths: wasmPaths === undefined ? null : wasmFolder(wasmPaths),
  };
}

function wasmFolder(address: string): string {
  try {
    return wholeAddress(address).href;
  } catch (error) {
    const message = `wasmPaths '${address}' is not a URL (${firstLine(error)})`;
    throw new VlmportError('OptionError', message, "for example './ort/'");
  }
}

function checkCaptionOptions(options: CaptionOptions): void {
  checkNames(options, CAPTION_OPTIONS);
  if (options.maxNewTokens !== undefined) checkCount('maxNewTokens', options.maxNewTokens);
}

/** Throws OptionError for what is no whole number from 1 on. */
export function checkCount(name: string, value: number): void {
  if (Number.isInteger(value) && value >= 1) return;
  const message = `${name}=${value}, expected a whole number of at least 1`;
  throw new VlmportError('OptionError', message, `for example ${name}: 2`);
}

/** Unknown options are refused, not ignored. */
export function checkNames(options: object, known: readonly string[]): void {
  const unknown = Object.keys(options).find(name => !known.includes(name));
  if (unknown === undefined) return;
  const message = `unknown option '${unknown}'${didYouMean(unknown, known)}`;
  throw new VlmportError('OptionError', message, `known: ${known.join(', ')}`);
}
