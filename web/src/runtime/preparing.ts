/**
 * Turn messages and images into requests (the twin of vlmport/runtime/preparing.py).
 *
 * A prompt is always the whole conversation, rendered again. As far as its ids (and, under image
 * tokens, its images) are those that the cache was computed from, nothing is encoded or prefilled
 * again.
 */

import type { Message } from '../bundle/manifest.js';
import { VlmportError } from '../errors.js';
import type { GenerationOptions } from './decoding/options.js';
import type { KeyValueCache } from './graphs/cache.js';
import type { Components } from './graphs/components.js';
import type { EncodedImage, FeatureCache, PromptImage } from './images/features.js';
import type { Prompter } from './prompt.js';
import { type Request, answerLength, newRequest } from './request.js';
import { StopStrings } from './streamed-text.js';

/** A cache, and the prompt that it was computed from. */
export interface ReusablePrefix {
  readonly cache: KeyValueCache;
  /** One token id for each token of the cache. */
  readonly ids: readonly number[];
  /** For each image row of that prompt, the key of its image. */
  readonly imageRows: readonly string[];
}

/** Messages and their processed images; some of the images may be encoded. */
export interface ProcessedQuestion {
  readonly messages: readonly Message[];
  readonly images: readonly PromptImage[];
  readonly options: GenerationOptions;
  /** Refuse a prompt that leaves no room for an answer: for maxNewTokens, or for a quarter of the
   * context where that is less. */
  readonly leavesRoom: boolean;
  /** The same question without the earlier messages; null where there are none. */
  readonly alone: readonly Message[] | null;
}

/** How to decode: the same for all answers of a request. */
export interface Decoding {
  readonly options: GenerationOptions;
  readonly stops: StopStrings | null;
}

/** A request, and what its response needs besides. */
export interface PreparedRequest {
  readonly request: Request;
  /** The whole prompt, image tokens included. */
  readonly ids: readonly number[];
  /** The number of tokens at the start that are in the cache. */
  readonly cachedTokens: number;
  /** The images of the prompt, encoded. */
  readonly images: readonly EncodedImage[];
  /** For each image row of the prompt, the key of its image. */
  readonly imageRows: readonly string[];
  /** When the images were encoded, by `performance.now()`. */
  readonly encodedAt: number;
  readonly decoding: Decoding;
}

/**
 * Count the tokens at the start that a new prompt has in common with a cache.
 *
 * At least one token of the prompt is left over: its logits choose the first new token.
 */
export function shared(
  reusable: Pick<ReusablePrefix, 'ids' | 'imageRows'>,
  ids: readonly number[],
  imageRows: readonly string[],
  imageTokenId: number,
): number {
  const length = Math.min(reusable.ids.length, ids.length - 1);
  for (let at = 0, row = 0; at < length; at++) {
    if (ids[at] !== reusable.ids[at]) return at;
    if (ids[at] !== imageTokenId) continue;
    // An image token that the model generated itself is text and belongs to no image.
    if (row >= reusable.imageRows.length || reusable.imageRows[row] !== imageRows[row]) return at;
    row++;
  }
  return Math.max(0, length);
}

/** A bundle's graphs, its chat template and tokenizer, and its image cache. */
export class Preparer {
  constructor(
    readonly components: Components,
    readonly prompter: Prompter,
    readonly features: FeatureCache,
  ) {}

  /**
   * Make a request: template → ids with images spliced in → embeddings with features over image
   * rows. Tokens that `reusable` has are not computed again, as far as the prompt begins alike.
   *
   * Throws PromptError for a prompt that does not fit, or OptionError, before anything is encoded;
   * BundleError or DeviceError, or the abort.
   */
  async assemble(
    question: ProcessedQuestion,
    reusable: ReusablePrefix | null,
    signal: AbortSignal,
  ): Promise<PreparedRequest> {
    const { components } = this;
    const ids = this.ids(question.messages, question.images);
    const maxNewTokens = this.answerLength(question, ids.length);
    components.checkIds(ids);
    const decoding = this.decoding(question.options);
    const { stops } = decoding;
    const isStopped = stops && ((tokens: readonly number[]) => stops.ends(tokens));
    const facts = { promptIds: ids, maxNewTokens, isStopped };
    const search = newRequest(components, question.options, facts);
    const token = components.manifest.prompt.image_token_id;
    const imageRows = question.images.flatMap(({ key, promptIds }) =>
      promptIds.filter(id => id === token).map(() => key),
    );
    const cachedTokens = reusable ? shared(reusable, ids, imageRows, token) : 0;
    const images: EncodedImage[] = [];
    for (const image of question.images) {
      images.push(await this.features.encoded(components, image, signal));
    }
    const encodedAt = performance.now();
    const inputs = await components.embedPrompt(ids, images, cachedTokens);
    const request = { ...inputs, ...search };
    return { request, ids, cachedTokens, images, imageRows, encodedAt, decoding };
  }

  private decoding(options: GenerationOptions): Decoding {
    const { stopStrings, skipSpecialTokens } = options;
    const { tokenizer } = this.prompter;
    const stops = stopStrings.length
      ? new StopStrings(tokenizer, stopStrings, skipSpecialTokens)
      : null;
    return { options, stops };
  }

  /** The token ids of checked messages, with the ids of their images. */
  private ids(messages: readonly Message[], images: readonly PromptImage[]): number[] {
    const ids = images.map(image => image.promptIds);
    return this.prompter.splice(this.prompter.ids(messages), ids);
  }

  /** Throws the PromptError of a full conversation where the question alone would fit. */
  private answerLength(question: ProcessedQuestion, tokens: number): number {
    const { manifest } = this.components;
    try {
      return answerLength(manifest, tokens, question.options, question.leavesRoom);
    } catch (error) {
      const isTooLong = error instanceof VlmportError && error.code === 'prompt.too-long';
      if (!isTooLong || !question.alone || !this.fitsAlone(question.alone, question.images)) {
        throw error;
      }
      const message = `the conversation is full: with this question ${error.message}`;
      const hint = 'call reset() to begin a new one, or use dropOldest: true';
      throw new VlmportError('PromptError', 'conversation.full', message, hint);
    }
  }

  /**
   * Whether a question without the earlier messages fits into the context. Its images are the last.
   */
  private fitsAlone(messages: readonly Message[], images: readonly PromptImage[]): boolean {
    const count = this.prompter.countPlaceholders(this.prompter.ids(messages));
    const ids = this.ids(messages, images.slice(images.length - count));
    return ids.length <= this.components.manifest.dims.context_length;
  }
}
