/**
 * Generate the answer of a prepared request, as text piece by piece and as a whole (the twin of
 * vlmport/runtime/response.py).
 */

import type { AnswerData, GeneratedResponse } from '../protocol.js';
import type { GenerationOptions } from './decoding/options.js';
import type { Hypothesis, StopReason } from './decoding/search.js';
import { generate } from './generate.js';
import type { KeyValueCache } from './graphs/cache.js';
import type { PreparedRequest } from './preparing.js';
import { type Decoder, type StopStrings, TextStream, decoded } from './streamed-text.js';

export interface ResponseOptions {
  readonly onPiece: (text: string) => void;
  /** When the work on the question began, by `performance.now()`. */
  readonly start: number;
  readonly signal: AbortSignal;
}

/** Decodes the tokens of an answer, all at once or as they come. */
export class AnswerText {
  private given = ''; // the text of all pieces so far
  private certain = '';
  private readonly stream: TextStream;
  private readonly skips: boolean;

  constructor(
    private readonly tokenizer: Decoder,
    private readonly stops: StopStrings | null,
    { skipSpecialTokens }: Pick<GenerationOptions, 'skipSpecialTokens'>,
  ) {
    this.skips = skipSpecialTokens;
    this.stream = new TextStream(tokenizer, skipSpecialTokens);
  }

  /**
   * Return the next piece that is certain, maybe ''; the whole rest once the answer stopped.
   * `tokens` are all tokens so far, the stop token included.
   */
  push(tokens: readonly number[], stopReason: StopReason | null): string {
    const shown = this.shown(tokens, stopReason);
    for (const token of shown.slice(this.stream.tokens.length)) {
      this.certain += this.stream.push(token);
    }
    if (stopReason) this.certain += this.stream.finish();
    let end = this.certain.length;
    if (this.stops && (stopReason === null || stopReason === 'stop_string')) {
      const held = this.stops.held(shown, stopReason === 'stop_string');
      end = Math.min(end, end + this.stream.pending.length - held);
    }
    const piece = this.certain.slice(this.given.length, Math.max(end, this.given.length));
    this.given += piece;
    return piece;
  }

  /** Return a whole answer. */
  whole({ tokens, stopReason, score, logprobs }: Hypothesis): AnswerData {
    return {
      text: this.text(this.shown(tokens, stopReason), stopReason),
      tokenIds: tokens,
      stopReason,
      complete: stopReason === 'stop' || stopReason === 'stop_string',
      score,
      logprobs,
    };
  }

  /** Return the text for a conversation's next prompt, whose template ends the turn itself. */
  withoutStopToken({ tokens, stopReason }: Hypothesis): string {
    return this.text(stopReason === 'stop' ? tokens.slice(0, -1) : tokens, stopReason);
  }

  /** Return the tokens of the text, with the stop token only if special tokens are kept. */
  private shown(tokens: readonly number[], reason: StopReason | null): readonly number[] {
    return reason === 'stop' && this.skips ? tokens.slice(0, -1) : tokens;
  }

  private text(shown: readonly number[], reason: StopReason | null): string {
    const text = decoded(this.tokenizer, shown, this.skips);
    if (!this.stops || reason !== 'stop_string') return text;
    return text.slice(0, text.length - this.stops.held(shown, true));
  }
}

/**
 * Generate the answer, with a cache that has the prompt's first `cachedTokens` tokens. An answer
 * that is the best of several has no pieces: which is best is known at the end.
 *
 * Throws BundleError, DeviceError or OptionError, or the abort.
 */
export async function respond(
  { request, ids, cachedTokens, imageRows, encodedAt, decoding }: PreparedRequest,
  cache: KeyValueCache,
  tokenizer: Decoder,
  { onPiece, start, signal }: ResponseOptions,
): Promise<GeneratedResponse> {
  const { search } = request;
  const text = new AnswerText(tokenizer, decoding.stops, decoding.options);
  let first = encodedAt;
  for await (const _ of generate(cache, request, signal)) {
    if (search.steps === 1) first = performance.now();
    if (search.rows > 1) continue;
    const { tokens, stopReason } = search.results()[0]!;
    const piece = text.push(tokens, stopReason);
    if (piece) onPiece(piece);
  }
  const seconds = (from: number, to: number) => (to - from) / 1000;
  const [best, ...others] = search.results();
  const whole = text.whole(best!);
  const caption = {
    ...whole,
    seed: search.seed,
    alternatives: others.map(one => text.whole(one)),
    timings: {
      image: seconds(start, encodedAt),
      prefill: seconds(encodedAt, first),
      decode: seconds(first, performance.now()),
    },
    counts: {
      promptTokens: ids.length,
      cachedTokens,
      imageTokens: imageRows.length,
      newTokens: whole.tokenIds.length,
    },
  };
  return { caption, history: text.withoutStopToken(best!) };
}
