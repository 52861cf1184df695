/** The messages between the page and its worker. */

import type { ImageOptions, Message } from './bundle/manifest.js';
import type { PlainError } from './errors.js';
import type { Defaults, GenerationOptions } from './runtime/decoding/options.js';
import type { StopReason, TokenLogprob } from './runtime/decoding/search.js';
import type { Watched } from './runtime/watched.js';

export type Device = 'webgpu' | 'wasm';

/** An image as it is sent to the worker. */
export type SentImage =
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
  // Pixel values that another program has made: the vision encoder's one input.
  | {
      readonly kind: 'values';
      readonly dims: readonly number[];
      readonly data: Float32Array<ArrayBuffer>;
    };

export interface Progress {
  /** The work being done: fetch files, open a graph, try the device. */
  readonly phase: 'download' | 'open' | 'probe' | 'ready';
  /** The current file or graph. */
  readonly name: string;
  readonly loadedBytes: number;
  readonly totalBytes: number;
}

/** Facts about a loaded bundle. */
export interface ModelInfo {
  readonly name: string;
  readonly device: Device;
  readonly precision: string;
  readonly threads: number;
  /** Why another device than the requested one is used, in plain words; null where it is not. */
  readonly reason: string | null;
  /** Limits that the user may want to know: one thread only, nothing kept, … */
  readonly notes: readonly string[];
  /** Whether the chat template takes text next to an image. */
  readonly takesQuestions: boolean;
  /** The messages that ask for a caption. */
  readonly caption: readonly Message[];
  /** The names of the image processor's options. */
  readonly imageOptions: readonly string[];
  /** The decoding options of the model's own generation_config.json that can be served. */
  readonly defaults: Defaults;
}

export interface LoadOptions {
  readonly url: string;
  readonly device: 'auto' | Device;
  readonly precision: string;
  readonly threads: number | null;
  readonly wasmPaths: string | null;
  readonly imageCacheBytes: number | null;
}

/** An image of a prompt, with the number by which a conversation knows it. */
export interface NumberedImage {
  readonly number: number;
  /** Null for an image that the worker has already. */
  readonly image: SentImage | null;
  /** Options for this image alone; they override those of the question. */
  readonly options?: ImageOptions;
}

/** A prompt, and how to answer it. */
export interface Question {
  /** Checked messages, with a part `{type: 'image'}` for each image. */
  readonly messages: readonly Message[];
  readonly images: readonly NumberedImage[];
  readonly imageOptions: ImageOptions;
  /** How the answer is decoded: the call's options over the bundle's defaults. */
  readonly options: GenerationOptions;
  /** Refuse a prompt that leaves no room for an answer. */
  readonly leavesRoom: boolean;
  /** The same question without the earlier messages; null where there are none. */
  readonly alone: readonly Message[] | null;
  /** The conversation whose images and cache are used; null for none. */
  readonly conversation: number | null;
}

/** One generated text as plain data. */
export interface AnswerData {
  /** The text before a stop string, without special tokens unless they were asked for. */
  readonly text: string;
  /** Token ids as generated; the stop token and the tokens of a stop string are among them. */
  readonly tokenIds: readonly number[];
  /** 'stop' for a stop token, 'stop_string', or 'length' for maxNewTokens or a full context; null
   * for a beam that had not ended when the search did. */
  readonly stopReason: StopReason | null;
  /** False for an answer that was cut, by maxNewTokens or by the end of the context. */
  readonly complete: boolean;
  /** The score of beam search; null without beams. */
  readonly score: number | null;
  /** One entry for each token, where they were asked for. */
  readonly logprobs: readonly TokenLogprob[] | null;
}

/** A response as plain data: the best answer, and what it cost. */
export interface CaptionData extends AnswerData {
  /** The random seed of sampling, also where none was given; null without sampling. */
  readonly seed: number | null;
  /** The other answers of numReturnSequences, best first. */
  readonly alternatives: readonly AnswerData[];
  /** Seconds. `image` is the time for reading and encoding images. */
  readonly timings: { readonly image: number; readonly prefill: number; readonly decode: number };
  readonly counts: {
    readonly promptTokens: number;
    /** Prompt tokens that a conversation did not need to prefill again. */
    readonly cachedTokens: number;
    readonly imageTokens: number;
    readonly newTokens: number;
  };
}

/** A response, and its text as the next turn of a conversation contains it. */
export interface GeneratedResponse {
  readonly caption: CaptionData;
  /** The text without the stop token. */
  readonly history: string;
}

/** A message from the page. */
export type WorkerRequest =
  | { readonly type: 'load'; readonly id: number; readonly options: LoadOptions }
  | { readonly type: 'generate'; readonly id: number; readonly question: Question }
  // Read and process an image for a later question.
  | {
      readonly type: 'attach';
      readonly id: number;
      readonly conversation: number;
      readonly image: NumberedImage;
      readonly imageOptions: ImageOptions;
    }
  // Remove images of a conversation, or all of it (numbers: null); without a conversation, empty
  // the cache of recently encoded images.
  | {
      readonly type: 'forget';
      readonly conversation: number | null;
      readonly numbers: readonly number[] | null;
    }
  | { readonly type: 'abort'; readonly id: number };

/** A request that has a reply, and can be aborted. */
export type RequestWithReply = Exclude<WorkerRequest, { readonly type: 'forget' | 'abort' }>;

/** A message from the worker. */
export type WorkerReply =
  // A template or a tokenizer starts, or has ended (null). It belongs to no request.
  | { readonly type: 'watched'; readonly id: 0; readonly doing: Watched | null }
  | { readonly type: 'progress'; readonly id: number; readonly progress: Progress }
  | { readonly type: 'loaded'; readonly id: number; readonly info: ModelInfo }
  // Another device has taken over.
  | { readonly type: 'changed'; readonly id: number; readonly info: ModelInfo }
  | { readonly type: 'piece'; readonly id: number; readonly text: string }
  | { readonly type: 'generated'; readonly id: number; readonly response: GeneratedResponse }
  | { readonly type: 'attached'; readonly id: number }
  | { readonly type: 'failed'; readonly id: number; readonly error: PlainError }
  | { readonly type: 'aborted'; readonly id: number };
