/**
 * Choose tokens from logits, as Hugging Face's `generate` does (the twin of
 * vlmport/runtime/decoding/__init__.py).
 *
 * `newSearch` puts the modules of this folder together for one request. Nothing here knows of
 * graphs, images or bundles.
 */

import { BeamSearch } from './beams.js';
import type { GenerationOptions } from './options.js';
import { type ProcessorFacts, newProcessors } from './processors.js';
import { newSeed } from './rng.js';
import { IndependentSearch, type IsStopped, type Search, StopCondition } from './search.js';

export interface SearchFacts extends ProcessorFacts {
  /** Called after each token that is not a stop token. */
  readonly isStopped: IsStopped | null;
}

/**
 * Make the search that the options ask for: greedy, sampling, beam search or beam sampling.
 *
 * `facts.promptIds` is the whole prompt, image tokens included; `facts.maxNewTokens` counts instead
 * of the one in the options. Throws OptionError for token ids outside the vocabulary, and for
 * options that don't work with this prompt.
 */
export function newSearch(options: GenerationOptions, facts: SearchFacts): Search {
  const processors = newProcessors(options, facts);
  const seed = options.doSample ? (options.seed ?? newSeed()) : null;
  const { stopTokenIds, maxNewTokens, isStopped, vocabSize } = facts;
  const stopCondition = new StopCondition(stopTokenIds, maxNewTokens, isStopped);
  return options.numBeams > 1
    ? new BeamSearch(options, processors, stopCondition, seed)
    : new IndependentSearch(options, processors, stopCondition, seed, vocabSize);
}
