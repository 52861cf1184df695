/**
 * The types of vlmport.json.
 *
 * Generated from vlmport/bundle/manifest.py: python -m tests.manifest_reference
 */

import type { Json } from './schema.js';

export type ImageOptions = Readonly<Record<string, boolean | number>>;

/** One component at one precision: its graph and the graph's external data files. */
export interface Variant {
  readonly model: string;
  readonly data: readonly string[];
}

/** Size in bytes, SHA-256 of the whole and of each 8 MiB. */
export interface FileEntry {
  readonly size: number;
  readonly sha256: string;
  /** SHA-256 of each 8 MiB in turn. */
  readonly chunks: readonly string[];
}

/** Sizes of the decoder that a runtime needs before it has run anything. */
export interface Dims {
  readonly hidden_size: number;
  readonly num_hidden_layers: number;
  readonly num_key_value_heads: number;
  readonly head_dim: number;
  readonly vocab_size: number;
  readonly context_length: number;
}

/** The names and axes of the cache tensors: `past + rest` becomes `present + rest`. */
export interface CacheLayout {
  /** Prefix of the decoder's cache inputs. */
  readonly past: string;
  /** Prefix of its cache outputs; the rest of the name is the same. */
  readonly present: string;
  readonly axes: readonly string[];
}

/** A part of a caption message: a text, or the place of an image. */
export interface CaptionPart {
  readonly type: 'image' | 'text';
  readonly text?: string;
}

/** One of the messages that ask for a caption. */
export interface CaptionMessage {
  readonly role: 'system' | 'user' | 'assistant';
  readonly content: string | readonly CaptionPart[];
}

/** The place of images in a prompt, and the messages that ask for a caption. */
export interface PromptSpec {
  readonly image_placeholder: string;
  /** Each occurrence in the tokenized prompt is replaced by one image's prompt_ids. */
  readonly placeholder_token_id: number;
  /** Rows of the embedding with this id are overwritten by image features, in order. */
  readonly image_token_id: number;
  /** The messages that ask for a caption of one image; they hold no image and no name of a file. */
  readonly caption: readonly CaptionMessage[];
}

/** When to stop, and the defaults of generation_config.json. */
export interface GenerationSpec {
  readonly stop_token_ids: readonly number[];
  readonly pad_token_id: number;
  readonly max_new_tokens: number;
  /** Whether repetition penalty and the like see prompt and image tokens too. */
  readonly processors_see_prompt: boolean;
  /** Sampling options of generation_config.json. */
  readonly defaults: Readonly<Record<string, Json>>;
}

/** The filter that the image processor resizes with, and the program whose pixels it gives. */
export interface PixelSpec {
  readonly resample: 'bilinear' | 'bicubic' | 'lanczos';
  /** The program whose pixels the image processor gives, with its version. */
  readonly equals: string;
}

/** A small RGB image. */
export interface GoldenImage {
  readonly width: number;
  readonly height: number;
  /** Base64 of height * width * 3 bytes. */
  readonly rgb: string;
}

/** Greedy tokens, and the first logits at some ids (float32), within `tolerance`. */
export interface GoldenExpectation {
  readonly tokens: readonly number[];
  readonly logit_ids: readonly number[];
  readonly logits: readonly number[];
  readonly tolerance: number;
}

/**
 * A fixed input of at least 64 tokens of prefill, and what each precision gives for it.
 *
 * A shorter prefill would not see the known fault of WebGPU attention (it starts at 32 rows).
 */
export interface Golden {
  readonly image: GoldenImage;
  /** How many times the image is in the prompt. */
  readonly copies: number;
  readonly prefill_tokens: number;
  /** Precision → greedy tokens and the first logits. */
  readonly expected: Readonly<Record<string, GoldenExpectation>>;
  /** The image processor's options for this image, where they are not image_options. */
  readonly options?: ImageOptions;
}

/** The result of `vlmport verify`. */
export interface Parity {
  readonly reference: string;
  readonly passed: boolean;
  readonly rows: readonly Readonly<Record<string, Json>>[];
}

/** The result of `vlmport eval` for one set of images. */
export interface Accuracy {
  /** The set of images, for people. */
  readonly data: string;
  /** Number of images. */
  readonly pictures: number;
  /** Number of questions; absent where the images were captioned. */
  readonly questions?: number;
  readonly sha256: string;
  readonly device: string;
  /** The programs that measured, with their versions. */
  readonly by: string;
  /** Whether no precision lost more to fp32 than its limit. */
  readonly passed: boolean;
  /** Precision → metric → its mean over all images, times 100. */
  readonly figures: Readonly<Record<string, Readonly<Record<string, number>>>>;
  /** Precision → how many points it may lose to fp32. */
  readonly limits: Readonly<Record<string, number>>;
}

/** The contents of vlmport.json, version 1. */
export interface Manifest {
  readonly format: 'vlmport';
  readonly version: number;
  /** Program and version that wrote the bundle. */
  readonly producer: string;
  readonly name: string;
  /** For people; no runtime reads it. */
  readonly family: string;
  /** Component → precision → its files; precision 'any' serves every precision. The layout says which components there must be. */
  readonly components: Readonly<Record<string, Readonly<Record<string, Variant>>>>;
  /** Device (cpu, cuda, webgpu, wasm, …) → component → what precision 'auto' means. */
  readonly auto: Readonly<Record<string, Readonly<Record<string, string>>>>;
  /** Every file of the bundle but vlmport.json and README.md, by its path with forward slashes. */
  readonly files: Readonly<Record<string, FileEntry>>;
  readonly dims: Dims;
  readonly cache: CacheLayout;
  readonly prompt: PromptSpec;
  readonly generation: GenerationSpec;
  readonly pixels: PixelSpec;
  /** A fixed input and what it must give, to try a device before it is trusted. */
  readonly golden: Golden;
  /** The latest result of `vlmport verify`, null before it ran. */
  readonly parity: Parity | null;
  /** Which form of folder; 'hub', that of transformers.js, where it is absent. */
  readonly layout?: string;
  /** Results of `vlmport eval`, one for each set of images; absent before it ran. */
  readonly accuracy?: readonly Accuracy[];
  /** The inputs of image_processor other than `image`, with their defaults; absent where there are none. */
  readonly image_options?: ImageOptions;
  /** Tensors that an export left out on request: pattern → the checkpoint's tensors that match it; absent where there are none. */
  readonly ignored_weights?: Readonly<Record<string, readonly string[]>>;
}
