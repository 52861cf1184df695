/** Greedy generation: a prompt in, tokens out (the twin of vlmport/runtime/generate.py). */

import type { Json } from '../bundle/schema.js';
import { VlmportError } from '../errors.js';
import type { KeyValueCache } from './graphs/cache.js';
import type { Prompt } from './graphs/components.js';
import { nextTask } from './tasks.js';

export interface GenerateOptions {
  readonly maxNewTokens: number;
  readonly stopTokenIds: ReadonlySet<number>;
  readonly signal: AbortSignal;
}

/** One token, and the scores that it was chosen by. */
export interface Step {
  readonly token: number;
  readonly scores: Float32Array;
}

/** Options of generation_config.json that change what is chosen greedily → where they do not. */
const IDLE: Readonly<Record<string, readonly Json[]>> = {
  do_sample: [false],
  num_beams: [1],
  min_new_tokens: [0],
  min_length: [0],
  repetition_penalty: [1],
  encoder_repetition_penalty: [1],
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

/** The defaults of a bundle that Python follows and greedy decoding does not, as 'name=value'. */
export function notFollowed(defaults: Readonly<Record<string, Json>>): string[] {
  const says = ([name, value]: [string, Json]) =>
    name in IDLE && value !== null && !IDLE[name]!.includes(value);
  return Object.entries(defaults)
    .filter(says)
    .map(([name, value]) => `${name}=${JSON.stringify(value)}`);
}

/**
 * Generate until a stop token, which is given out too, or `maxNewTokens`. Disposes the embeddings;
 * the cache then holds the prompt and all tokens but the last.
 */
export async function* generate(
  cache: KeyValueCache,
  prompt: Prompt,
  { maxNewTokens, stopTokenIds, signal }: GenerateOptions,
): AsyncGenerator<Step, void, undefined> {
  cache.offset = prompt.offset;
  let scores = await cache.append(prompt.embeds, prompt.positions);
  for (let made = 1; ; made++) {
    const token = best(scores);
    if (!Number.isFinite(scores[token])) {
      const message = `the decoder's scores are not finite at token ${made - 1}`;
      throw new VlmportError(
        'DeviceError',
        'device.not-finite',
        message,
        'another device or precision may work',
      );
    }
    yield { token, scores };
    if (stopTokenIds.has(token) || made >= maxNewTokens) return;
    await nextTask();
    signal.throwIfAborted();
    scores = await cache.append(await cache.components.embed([token]));
  }
}

/** The index of the highest score, the first of several; of a NaN where there is one. */
export function best(scores: Float32Array): number {
  let at = 0;
  for (let i = 0; i < scores.length; i++) {
    if (Number.isNaN(scores[i])) return i;
    if (scores[i]! > scores[at]!) at = i;
  }
  return at;
}
