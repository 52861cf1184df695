/**
 * A request: one prompt and the search for its answer, and whether both fit into the context (the
 * twin of vlmport/runtime/request.py).
 */

import type { Manifest } from '../bundle/manifest.js';
import { VlmportError } from '../errors.js';
import { newSearch } from './decoding/new-search.js';
import {
  type GenerationOptions,
  maxNewTokensAfter,
  minNewTokensAfter,
} from './decoding/options.js';
import { checkServed } from './decoding/processors.js';
import { lookUp } from './decoding/prompt-lookup.js';
import type { IsStopped, Search } from './decoding/search.js';
import type { Components, PromptInputs } from './graphs/components.js';

/** How drafts are looked up, see decoding/prompt-lookup.ts. */
interface Lookup {
  readonly numTokens: number;
  readonly maxNgram: number;
  /** Ids at which a draft ends, because the text can't go on with them or after them. */
  readonly until: ReadonlySet<number>;
}

/** A prompt, or the part of it that is not in the cache, and the search for its answer. */
export interface Request extends PromptInputs {
  readonly search: Search;
  readonly maxNewTokens: number;
  /** The ids of the whole prompt, for drafts. */
  readonly promptIds: readonly number[];
  readonly lookup: Lookup | null;
}

/** What a request is made of, besides the options. */
export interface RequestFacts {
  readonly promptIds: readonly number[];
  readonly maxNewTokens: number;
  readonly isStopped: IsStopped | null;
}

/**
 * Make the search of a request with the bundle's stop tokens, and its lookup of drafts.
 *
 * Throws OptionError for options that don't work with this prompt or these graphs.
 */
export function newRequest(
  components: Components,
  options: GenerationOptions,
  facts: RequestFacts,
): Omit<Request, keyof PromptInputs> {
  const { generation, dims, prompt } = components.manifest;
  const stopTokenIds = new Set(generation.stop_token_ids);
  const { promptIds, maxNewTokens } = facts;
  const search = newSearch(options, {
    ...facts,
    processorsSeePrompt: generation.processors_see_prompt,
    stopTokenIds,
    vocabSize: dims.vocab_size,
    mask: null,
  });
  let lookup: Lookup | null = null;
  if (options.promptLookupNumTokens !== null) {
    refuseLookup(components);
    const odd = promptIds.filter(token => token >= dims.vocab_size);
    const until = new Set([...odd, ...stopTokenIds, prompt.image_token_id]);
    const { promptLookupNumTokens: numTokens, maxMatchingNgramSize: maxNgram } = options;
    lookup = { numTokens, maxNgram, until };
  }
  return { search, maxNewTokens, promptIds, lookup };
}

/** Look up tokens that are likely to follow `made`, to be verified in one call; [] for none. */
export function draftOf(
  { lookup, maxNewTokens, promptIds }: Request,
  made: readonly number[],
): number[] {
  if (lookup === null) return [];
  const count = Math.min(lookup.numTokens, maxNewTokens - made.length - 1);
  return count > 0 ? lookUp([...promptIds, ...made], count, lookup.maxNgram, lookup.until) : [];
}

/**
 * Throw OptionError where tokens of one call have other logits than tokens fed one by one.
 *
 * In float32 the order of sums changes the last bits only. In float16 that is enough to change a
 * text.
 */
function refuseLookup({ decoder, precision }: Components): void {
  const is16Bit = decoder.ports.some(port => port.type === 'float16');
  const reason = decoder.rowByRow
    ? 'scales activations by all tokens of a call'
    : is16Bit && 'computes in float16, where several tokens in one call round differently';
  if (!reason) return;
  const message = `promptLookupNumTokens at ${precision}: this decoder ${reason}, so a draft could change the text`;
  const hint = 'use another precision for the decoder (fp32 or q4), or leave the option out';
  throw new VlmportError('OptionError', 'option.not-for-this-model', message, hint);
}

/** Throw OptionError for a default of generation_config.json that this bundle can't serve. */
export function checkDefault(components: Components, name: string, value: unknown): void {
  const { generation, dims } = components.manifest;
  checkServed(name, value, dims.vocab_size, generation.processors_see_prompt);
  const limit = generation.max_new_tokens;
  if ((name === 'minNewTokens' || name === 'minLength') && (value as number) > limit) {
    const message = `${name}=${value as number} is more than maxNewTokens=${limit}`;
    throw new VlmportError('OptionError', 'option.contradiction', message, 'lower it');
  }
  if (name === 'promptLookupNumTokens' && value !== null) refuseLookup(components);
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
 * Return the maximum number of new tokens for a prompt of `tokens` tokens: the number that the
 * options ask for, or the bundle's default, limited by the context.
 *
 * With `leavesRoom`, a prompt is refused after which the context has room for less than that number
 * and less than a quarter of itself. Throws PromptError for a prompt that does not fit, OptionError
 * where the context or the options allow less than minNewTokens, or no new token.
 */
export function answerLength(
  manifest: Manifest,
  tokens: number,
  options: GenerationOptions,
  leavesRoom = false,
): number {
  const room = roomForTokens(manifest, tokens);
  const asked = maxNewTokensAfter(options, tokens);
  const wanted = asked ?? manifest.generation.max_new_tokens;
  const least = minNewTokensAfter(options, tokens);
  if (leavesRoom && room < Math.min(wanted, Math.floor(manifest.dims.context_length / 4))) {
    throw tooLong(`a prompt of ${tokens} tokens leaves room for ${room} in the context`);
  }
  if (!wanted) {
    const message = `maxLength=${options.maxLength}, but the prompt alone has ${tokens} tokens`;
    const hint = 'use maxNewTokens, which does not count the prompt';
    throw new VlmportError('OptionError', 'option.no-room', message, hint);
  }
  if (least > room) {
    const message = `minNewTokens=${least}, but the context allows ${room} after a prompt of ${tokens} tokens`;
    const hint = 'lower it, or use fewer or smaller images or a shorter prompt';
    throw new VlmportError('OptionError', 'option.no-room', message, hint);
  }
  if (least > wanted) {
    const whose = asked === null ? "this model's default maxNewTokens" : 'maxNewTokens';
    const message = `minNewTokens=${least} is more than ${whose}=${wanted}`;
    const hint = `give maxNewTokens too, at least ${least}`;
    throw new VlmportError('OptionError', 'option.contradiction', message, hint);
  }
  return Math.min(wanted, room);
}

function tooLong(message: string): VlmportError {
  const hint = 'use fewer or smaller images, or a shorter prompt';
  return new VlmportError('PromptError', 'prompt.too-long', message, hint);
}
