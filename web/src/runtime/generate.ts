/** Greedy generation: a prompt in, tokens out (the twin of vlmport/runtime/generate.py). */

import type { Json } from '../bundle/schema.js';
import { VlmportError } from '../errors.js';
import type { KeyValueCache } from './graphs/cache.js';
import type { Request } from './request.js';
import { nextTask } from './tasks.js';

export interface GenerateOptions {
  readonly stopTokenIds: ReadonlySet<number>;
  readonly signal: AbortSignal;
}

/** One token, and the scores from which it was chosen. */
export interface Step {
  readonly token: number;
  readonly scores: Float32Array;
}

/** Options of generation_config.json that affect greedy decoding → values that have no effect. */
const NO_EFFECT: Readonly<Record<string, readonly Json[]>> = {
  do_sample: [false],
  num_beams: [1],
  min_new_tokens: [0],
  min_length: [0],
  repetition_penalty: [1],
  encoder_repetition_penalty: [1],
  presence_penalty: [0],
  frequency_penalty: [0],
  no_repeat_ngram_size: [0],
  encoder_no_repeat_ngram_size: [0],
  stop_strings: [],
  sequence_bias: [],
  bad_words_ids: [],
  suppress_tokens: [],
  begin_suppress_tokens: [],
  forced_eos_token_id: [],
  exponential_decay_length_penalty: [],
};

/** List the bundle's defaults that Python follows and greedy decoding does not, as 'name=value'. */
export function notFollowed(defaults: Readonly<Record<string, Json>>): string[] {
  const hasEffect = ([name, value]: [string, Json]) =>
    name in NO_EFFECT && value !== null && !NO_EFFECT[name]!.includes(value);
  return Object.entries(defaults)
    .filter(hasEffect)
    .map(([name, value]) => `${name}=${JSON.stringify(value)}`);
}

/**
 * Generate until a stop token, which is yielded too, or `maxNewTokens`. Disposes the request's
 * embeddings. At the end the cache contains the prompt and all new tokens but the last.
 */
export async function* generate(
  cache: KeyValueCache,
  { embeds, positions, maxNewTokens }: Request,
  { stopTokenIds, signal }: GenerateOptions,
): AsyncGenerator<Step, void, undefined> {
  cache.ropeDelta = positions.ropeDelta;
  let scores = await cache.append(embeds, positions.ids);
  for (let made = 1; ; made++) {
    const token = best(scores);
    if (!Number.isFinite(scores[token])) {
      const message = `the decoder's scores are NaN or infinite at token ${made - 1}`;
      const hint = 'try another device or precision';
      throw new VlmportError('DeviceError', 'device.not-finite', message, hint);
    }
    yield { token, scores };
    if (stopTokenIds.has(token) || made >= maxNewTokens) return;
    await nextTask();
    signal.throwIfAborted();
    scores = await cache.append(await cache.components.embed([token]));
  }
}

/** Return the index of the highest score (the first of several), or of the first NaN. */
export function best(scores: Float32Array): number {
  let at = 0;
  for (let i = 0; i < scores.length; i++) {
    if (Number.isNaN(scores[i])) return i;
    if (scores[i]! > scores[at]!) at = i;
  }
  return at;
}
