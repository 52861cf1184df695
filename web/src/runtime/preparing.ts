/**
 * What is asked, made ready to run, and what came of it (the twin of vlmport/runtime/preparing.py and
 * vlmport/runtime/conversation.py): messages and pictures to a prompt, a prompt to its caption.
 *
 * A prompt is always the whole conversation, rendered again. As far as its ids (and, under image
 * tokens, its pictures) are those that the cache was made of, nothing is encoded or prefilled again.
 */

import type { Message } from '../bundle/manifest.js';
import { VlmportError } from '../errors.js';
import type { CaptionData } from '../protocol.js';
import { type KeyValueCache, openCache } from './graphs/cache.js';
import type { Components } from './graphs/components.js';
import type { FeatureCache, Picture } from './images/features.js';
import { generate } from './generate.js';
import type { Prompter } from './prompt.js';
import { TextStream } from './streamed-text.js';

/** A bundle that is loaded, and the cache of recently encoded pictures. */
export interface Model {
  readonly components: Components;
  readonly prompter: Prompter;
  readonly features: FeatureCache;
}

/** A cache, and what it was made of. */
export interface Held {
  readonly cache: KeyValueCache;
  /** A token id for each token of the cache. */
  readonly ids: readonly number[];
  /** Of each image row of the prompt, the key of the picture that it is of. */
  readonly imageRows: readonly string[];
}

/** What is kept from turn to turn. Its cache is disposed by whoever owns it. */
export interface Kept {
  held: Held | null;
}

/** One question: its pictures are processed, some may be encoded. */
export interface Question {
  readonly messages: readonly Message[];
  readonly pictures: readonly Picture[];
  readonly maxNewTokens: number | null;
  readonly skipSpecialTokens: boolean;
  /** Refuse a prompt that leaves no room for an answer: for maxNewTokens, or a quarter of the
   * context where that is less. */
  readonly leavesRoom: boolean;
  /** The same question without what was said before it; null where nothing was. */
  readonly alone: readonly Message[] | null;
}

/** An answer, and its text without the stop token, with which a conversation goes on. */
export interface Answered {
  readonly caption: CaptionData;
  readonly said: string;
}

export interface Hearing {
  readonly onPiece: (text: string) => void;
  /** The pictures, once they are encoded. */
  readonly onEncoded: (pictures: readonly Picture[]) => void;
  /** When the work began. */
  readonly start: number;
}

/**
 * How many tokens from the start a prompt has in common with what is held.
 *
 * At least one token of the prompt is left: its logits choose the first new one.
 */
export function shared(
  held: Held,
  ids: readonly number[],
  imageRows: readonly string[],
  imageTokenId: number,
): number {
  const most = Math.min(held.ids.length, ids.length - 1);
  for (let at = 0, row = 0; at < most; at++) {
    if (ids[at] !== held.ids[at]) return at;
    if (ids[at] !== imageTokenId) continue;
    // An image token that the model said itself is a word, and of no picture.
    if (row >= held.imageRows.length || held.imageRows[row] !== imageRows[row]) return at;
    row++;
  }
  return Math.max(0, most);
}

/** A prompt that fits, before anything of it has run. */
interface Plan {
  readonly ids: readonly number[];
  readonly imageRows: readonly string[];
  readonly maxNewTokens: number;
}

/** Throws PromptError for what does not fit together, or into the context. */
function plan({ components, prompter }: Model, question: Question): Plan {
  const { prompt, generation, dims } = components.manifest;
  const promptIds = question.pictures.map(one => one.promptIds);
  const ids = prompter.splice(prompter.ids(question.messages), promptIds);
  if (!ids.length) {
    throw new VlmportError(
      'PromptError',
      'prompt.empty',
      'the prompt is empty',
      'give it a text or a picture',
    );
  }
  const context = dims.context_length;
  if (ids.length > context) {
    const message = `the prompt has ${ids.length} tokens, the model's context is ${context}`;
    throw tooLong(prompter, question, context, message);
  }
  components.checkIds(ids);
  const room = context - ids.length + 1; // the last token is never fed back
  const wanted = question.maxNewTokens ?? generation.max_new_tokens;
  if (question.leavesRoom && room < Math.min(wanted, Math.floor(context / 4))) {
    const message = `a prompt of ${ids.length} tokens leaves room for ${room} in the context`;
    throw tooLong(prompter, question, context, message);
  }
  const maxNewTokens = Math.min(wanted, room);
  const isImage = (id: number) => id === prompt.image_token_id;
  const rowsOf = ({ key, promptIds }: Picture) => promptIds.filter(isImage).map(() => key);
  return { ids, imageRows: question.pictures.flatMap(rowsOf), maxNewTokens };
}

/** The error of a prompt that does not fit: where it would alone, the conversation is full. */
function tooLong(prompter: Prompter, question: Question, context: number, message: string) {
  const { alone, pictures } = question;
  if (alone) {
    const ids = prompter.ids(alone);
    const own = pictures.slice(pictures.length - prompter.countPlaceholders(ids));
    const spliced = prompter.splice(
      ids,
      own.map(one => one.promptIds),
    );
    if (spliced.length <= context) {
      const text = `the conversation is full: with this question ${message}`;
      const hint = 'reset() begins a new one; with dropOldest: true the oldest turns are forgotten';
      return new VlmportError('PromptError', 'conversation.full', text, hint);
    }
  }
  const hint = 'fewer or smaller pictures, or a shorter prompt';
  return new VlmportError('PromptError', 'prompt.too-long', message, hint);
}

/**
 * Answer a question: template → ids with pictures spliced in → embeddings with features over image
 * rows → text. What does not fit is refused before anything is encoded.
 *
 * `kept` has afterwards what the cache holds, also of an answer that was given up; of one that
 * failed, nothing.
 *
 * Throws PromptError, BundleError or DeviceError, or the abort.
 */
export async function answer(
  model: Model,
  question: Question,
  kept: Kept,
  hear: Hearing,
  signal: AbortSignal,
): Promise<Answered> {
  const { components, features, prompter } = model;
  const { ids, imageRows, maxNewTokens } = plan(model, question);
  const { prompt, generation } = components.manifest;
  const before = kept.held?.cache.components === components ? kept.held : null; // else of a lost GPU
  const cached = before ? shared(before, ids, imageRows, prompt.image_token_id) : 0;
  const pictures = [];
  for (const one of question.pictures) {
    pictures.push(await features.encoded(components, one, signal));
  }
  hear.onEncoded(pictures);
  const encoded = performance.now();
  const fresh = await components.prompt(ids, pictures, cached);
  const capacity = ids.length + maxNewTokens - 1;
  const cache = before?.cache ?? openCache(components, capacity);
  const stopTokenIds = new Set(generation.stop_token_ids);
  const tokenIds: number[] = [];
  const { skipSpecialTokens: skips } = question;
  const text = new TextStream(prompter.tokenizer, skips);
  const say = (piece: string) => piece && hear.onPiece(piece);
  let first = encoded;
  try {
    cache.truncate(cached);
    cache.reserve(capacity);
    for await (const { token } of generate(cache, fresh, { maxNewTokens, stopTokenIds, signal })) {
      if (tokenIds.push(token) === 1) first = performance.now();
      // The stop token is a special token.
      if (!skips || !stopTokenIds.has(token)) say(text.push(token));
    }
  } catch (error) {
    if (!signal.aborted) cache.truncate(0); // what it holds is not known
    throw error;
  } finally {
    kept.held = { cache, ids: [...ids, ...tokenIds].slice(0, cache.length), imageRows };
  }
  say(text.finish());
  const seconds = (from: number, to: number) => (to - from) / 1000;
  const stopped = stopTokenIds.has(tokenIds.at(-1) ?? -1);
  const caption: CaptionData = {
    text: text.whole(),
    tokenIds,
    stopReason: stopped ? 'stop' : 'length',
    complete: stopped,
    timings: {
      image: seconds(hear.start, encoded),
      prefill: seconds(encoded, first),
      decode: seconds(first, performance.now()),
    },
    counts: {
      promptTokens: ids.length,
      cachedTokens: cached,
      imageTokens: imageRows.length,
      newTokens: tokenIds.length,
    },
  };
  return { caption, said: text.decode(stopped ? tokenIds.slice(0, -1) : tokenIds) };
}
