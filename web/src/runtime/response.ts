/**
 * Generate the answer of a prepared request, as text piece by piece and as a whole (the twin of
 * vlmport/runtime/response.py).
 */

import type { GeneratedResponse } from '../protocol.js';
import { generate } from './generate.js';
import type { KeyValueCache } from './graphs/cache.js';
import type { PreparedRequest } from './preparing.js';
import type { Prompter } from './prompt.js';
import { TextStream } from './streamed-text.js';

export interface ResponseOptions {
  readonly skipSpecialTokens: boolean;
  readonly onPiece: (text: string) => void;
  /** When the work on the question began, by `performance.now()`. */
  readonly start: number;
  readonly signal: AbortSignal;
}

/**
 * Generate the answer, with a cache that has the prompt's first `cachedTokens` tokens.
 *
 * `tokenIds` gets each token as it is generated, so that the caller has them also where this
 * throws. Throws BundleError or DeviceError, or the abort.
 */
export async function respond(
  { request, ids, cachedTokens, imageRows, encodedAt }: PreparedRequest,
  cache: KeyValueCache,
  prompter: Prompter,
  tokenIds: number[],
  { skipSpecialTokens, onPiece, start, signal }: ResponseOptions,
): Promise<GeneratedResponse> {
  const stopTokenIds = new Set(cache.components.manifest.generation.stop_token_ids);
  const text = new TextStream(prompter.tokenizer, skipSpecialTokens);
  const give = (piece: string) => piece && onPiece(piece);
  let first = encodedAt;
  for await (const { token } of generate(cache, request, { stopTokenIds, signal })) {
    if (tokenIds.push(token) === 1) first = performance.now();
    // The stop token is a special token.
    if (!skipSpecialTokens || !stopTokenIds.has(token)) give(text.push(token));
  }
  give(text.finish());
  const seconds = (from: number, to: number) => (to - from) / 1000;
  const stopped = stopTokenIds.has(tokenIds.at(-1) ?? -1);
  const caption = {
    text: text.whole(),
    tokenIds,
    stopReason: stopped ? ('stop' as const) : ('length' as const),
    complete: stopped,
    timings: {
      image: seconds(start, encodedAt),
      prefill: seconds(encodedAt, first),
      decode: seconds(first, performance.now()),
    },
    counts: {
      promptTokens: ids.length,
      cachedTokens,
      imageTokens: imageRows.length,
      newTokens: tokenIds.length,
    },
  };
  return { caption, history: text.decode(stopped ? tokenIds.slice(0, -1) : tokenIds) };
}
