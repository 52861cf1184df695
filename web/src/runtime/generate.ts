/** The loop: a prompt in, tokens out, greedily. */

import { VlmportError } from '../errors.js';
import { openCache } from './cache.js';
import type { Components } from './components.js';
import type { Tensor } from './sessions.js';

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

/** Generate until a stop token, which is given out too, or `maxNewTokens`. Disposes `embeds`. */
export async function* generate(
  components: Components,
  embeds: Tensor,
  { maxNewTokens, stopTokenIds, signal }: GenerateOptions,
): AsyncGenerator<Step, void, undefined> {
  // The last token is never fed back, so it needs no room.
  const cache = openCache(components, (embeds.dims[1] ?? 0) + maxNewTokens - 1);
  try {
    let next = embeds;
    for (let made = 1; ; made++) {
      const scores = await cache.append(next);
      const token = best(scores);
      if (!Number.isFinite(scores[token])) {
        const message = `the decoder's scores are not finite at token ${made - 1}`;
        throw new VlmportError('DeviceError', message, 'another device or precision may work');
      }
      yield { token, scores };
      if (stopTokenIds.has(token) || made >= maxNewTokens) return;
      await nextTask(); // WebAssembly never waits: without this no abort would be heard
      signal.throwIfAborted();
      next = await components.embed([token]);
    }
  } finally {
    cache.dispose();
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

const channel = new MessageChannel();

/** Let messages in. */
export function nextTask(): Promise<void> {
  return new Promise(resolve => {
    channel.port1.onmessage = () => resolve();
    channel.port2.postMessage(null);
  });
}
