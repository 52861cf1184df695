/** A request, and whether it fits into the context (the twin of vlmport/runtime/request.py). */

import type { Manifest } from '../bundle/manifest.js';
import { VlmportError } from '../errors.js';
import type { PromptInputs } from './graphs/components.js';

/** A prompt, or the part of it that is not in the cache, and how much may be generated. */
export interface Request extends PromptInputs {
  readonly maxNewTokens: number;
}

/** Return the maximum number of new tokens that the context allows after `tokens` tokens. Throws
 * PromptError for a prompt that is empty or longer than the context. */
export function roomForTokens({ dims }: Manifest, tokens: number): number {
  const limit = dims.context_length;
  if (!tokens) {
    const hint = 'give it a text or an image';
    throw new VlmportError('PromptError', 'prompt.empty', 'the prompt is empty', hint);
  }
  if (tokens > limit) {
    throw tooLong(`the prompt has ${tokens} tokens, the model's context is ${limit}`);
  }
  return limit - tokens + 1; // the last token is never fed back
}

/**
 * Return the maximum number of new tokens for a prompt of `tokens` tokens: `wanted`, or the
 * bundle's default, limited by the context.
 *
 * With `leavesRoom`, a prompt is refused after which the context has room for less than that number
 * and less than a quarter of itself. Throws PromptError for a prompt that does not fit.
 */
export function answerLength(
  manifest: Manifest,
  tokens: number,
  wanted: number | null,
  leavesRoom = false,
): number {
  const room = roomForTokens(manifest, tokens);
  const length = wanted ?? manifest.generation.max_new_tokens;
  if (leavesRoom && room < Math.min(length, Math.floor(manifest.dims.context_length / 4))) {
    throw tooLong(`a prompt of ${tokens} tokens leaves room for ${room} in the context`);
  }
  return Math.min(length, room);
}

function tooLong(message: string): VlmportError {
  const hint = 'use fewer or smaller images, or a shorter prompt';
  return new VlmportError('PromptError', 'prompt.too-long', message, hint);
}
