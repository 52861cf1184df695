/** What page and worker say to each other. */

import type { ImageOptions, Message } from './bundle/manifest.js';
import type { PlainError } from './errors.js';
import type { Watched } from './runtime/watched.js';

export type Device = 'webgpu' | 'wasm';

/** A picture on its way to the worker. */
export type Picture =
  | { readonly kind: 'blob'; readonly blob: Blob }
  | { readonly kind: 'url'; readonly url: string }
  | { readonly kind: 'bitmap'; readonly bitmap: ImageBitmap }
  | {
      readonly kind: 'pixels';
      readonly width: number;
      readonly height: number;
      readonly channels: 1 | 3 | 4;
      readonly data: Uint8Array<ArrayBuffer> | Uint8ClampedArray<ArrayBuffer>;
    }
  // What another program has made of a picture: the vision encoder's one input.
  | {
      readonly kind: 'values';
      readonly dims: readonly number[];
      readonly data: Float32Array<ArrayBuffer>;
    };

export interface Progress {
  /** What is being done: fetching files, opening a graph, trying the device. */
  readonly phase: 'download' | 'open' | 'probe' | 'ready';
  /** The file or graph at hand. */
  readonly name: string;
  readonly loadedBytes: number;
  readonly totalBytes: number;
}

/** What came of loading a bundle. */
export interface Info {
  readonly name: string;
  readonly device: Device;
  readonly precision: string;
  readonly threads: number;
  /** Why this device and not another, in plain words; null where it is the one asked for. */
  readonly reason: string | null;
  /** What else a person may want to know: one thread only, nothing kept, … */
  readonly notes: readonly string[];
  /** Whether its template takes words beside a picture. */
  readonly takesQuestions: boolean;
  /** What asks for a caption. */
  readonly caption: readonly Message[];
  /** Names of the image processor's options. */
  readonly imageOptions: readonly string[];
}

export interface LoadOptions {
  readonly url: string;
  readonly device: 'auto' | Device;
  readonly precision: string;
  readonly threads: number | null;
  readonly wasmPaths: string | null;
  readonly imageCacheBytes: number | null;
}

/** A picture of a prompt. A conversation knows it by a number; null: it has come before. */
export interface NumberedPicture {
  readonly number: number;
  readonly picture: Picture | null;
  /** For this picture alone, over those of the question. */
  readonly options?: ImageOptions;
}

/** A prompt, and how to answer it. */
export interface Asked {
  /** Checked; a part `{type: 'image'}` for each picture. */
  readonly messages: readonly Message[];
  readonly pictures: readonly NumberedPicture[];
  readonly imageOptions: ImageOptions;
  readonly maxNewTokens: number | null;
  readonly skipSpecialTokens: boolean;
  /** Refuse a prompt that leaves no room for an answer. */
  readonly leavesRoom: boolean;
  /** The same question without what was said before it; null where nothing was. */
  readonly alone: readonly Message[] | null;
  /** Whose pictures and cache these are; null for none. */
  readonly conversation: number | null;
}

/** Generated text; `toString()` of what the page gets gives it. */
export interface CaptionData {
  readonly text: string;
  /** As generated, the stop token included. */
  readonly tokenIds: readonly number[];
  readonly stopReason: 'stop' | 'length';
  /** False where the answer was cut: by maxNewTokens or a full context. */
  readonly complete: boolean;
  /** Seconds. `image` is reading and encoding. */
  readonly timings: { readonly image: number; readonly prefill: number; readonly decode: number };
  readonly counts: {
    readonly promptTokens: number;
    /** Those that a conversation had not to prefill again. */
    readonly cachedTokens: number;
    readonly imageTokens: number;
    readonly newTokens: number;
  };
}

export type Request =
  | { readonly type: 'load'; readonly id: number; readonly options: LoadOptions }
  | { readonly type: 'answer'; readonly id: number; readonly asked: Asked }
  // A picture for a question to come: read, cut and known by its number.
  | {
      readonly type: 'attach';
      readonly id: number;
      readonly conversation: number;
      readonly picture: NumberedPicture;
      readonly imageOptions: ImageOptions;
    }
  // Pictures of a conversation, all of it (null), or the cache of recently encoded ones.
  | {
      readonly type: 'forget';
      readonly conversation: number | null;
      readonly numbers: readonly number[] | null;
    }
  | { readonly type: 'abort'; readonly id: number };

/** A request that is answered, and can be aborted. */
export type Started = Exclude<Request, { readonly type: 'forget' | 'abort' }>;

export type Reply =
  // A template or a tokenizer runs, or no longer does; of no request.
  | { readonly type: 'watched'; readonly id: 0; readonly doing: Watched | null }
  | { readonly type: 'progress'; readonly id: number; readonly progress: Progress }
  | { readonly type: 'loaded'; readonly id: number; readonly info: Info }
  | { readonly type: 'changed'; readonly id: number; readonly info: Info } // another device now
  | { readonly type: 'piece'; readonly id: number; readonly text: string }
  | {
      readonly type: 'answered';
      readonly id: number;
      readonly caption: CaptionData;
      readonly said: string;
    } // without the stop token
  | { readonly type: 'attached'; readonly id: number }
  | { readonly type: 'failed'; readonly id: number; readonly error: PlainError }
  | { readonly type: 'aborted'; readonly id: number };
