/**
 * The decoding options of every method that generates, with their types (the twin of
 * vlmport/runtime/decoding/generate_options.py).
 */

type Ids = readonly number[];

/**
 * How tokens are chosen, and when an answer ends: the options of Hugging Face's `generate`.
 *
 * An option that is left out has the bundle's default; null is the value that does nothing.
 */
export interface DecodingOptions {
  /** Maximum number of new tokens (default: the bundle's). */
  maxNewTokens?: number | null;
  /** Minimum number of new tokens before a stop token may be chosen. */
  minNewTokens?: number | null;
  /** As maxNewTokens, with the tokens of the prompt counted too. */
  maxLength?: number | null;
  /** As minNewTokens, with the tokens of the prompt counted too. */
  minLength?: number | null;
  /** Texts that end an answer. The answer ends before the text. */
  stopStrings?: string | readonly string[] | null;
  /** Sample tokens at random instead of taking the most likely. */
  doSample?: boolean | null;
  /** Number of beams of beam search; 1 (default) is greedy search or sampling. */
  numBeams?: number | null;
  /** Number of answers to return; more than 1 with beams or sampling. */
  numReturnSequences?: number | null;
  /** Random seed for sampling, from 0 to 2³² - 1; without it a new one is taken and reported. */
  seed?: number | null;
  /** When beam search stops: true as soon as numBeams answers have ended, false (default) when a
   * better one is unlikely, 'never' when none can be better. */
  earlyStopping?: boolean | 'never' | null;
  /** Exponent of the length by which a beam's score is divided; above 0 favours long answers. */
  lengthPenalty?: number | null;
  /** Numbers to add to the score of the last token of a sequence, after its others:
   * `[[[5, 17], -2.0]]`, or a Map. */
  sequenceBias?: ReadonlyMap<Ids, number> | readonly (readonly [Ids, number])[] | null;
  /** Above 1 makes tokens of the prompt more likely. */
  encoderRepetitionPenalty?: number | null;
  /** Above 1 makes tokens that occurred less likely. */
  repetitionPenalty?: number | null;
  /** Number to subtract from the score of each token that the answer has, as in OpenAI's API. */
  presencePenalty?: number | null;
  /** Number to subtract from the score of a token for each time that the answer has it. */
  frequencyPenalty?: number | null;
  /** Length in tokens of sequences that may not occur twice; 0 allows all. */
  noRepeatNgramSize?: number | null;
  /** Length in tokens of sequences of the prompt that may not occur in the answer; 0 allows all. */
  encoderNoRepeatNgramSize?: number | null;
  /** Sequences of token ids that may not occur. */
  badWordsIds?: readonly Ids[] | null;
  /** Token ids, one of which ends an answer that reaches maxNewTokens. */
  forcedEosTokenId?: number | Ids | null;
  /** Replace NaN scores by 0 and infinite ones by the largest number. */
  removeInvalidValues?: boolean | null;
  /** [start, factor]: after `start` tokens stop tokens get more likely, by the factor for each
   * further token. */
  exponentialDecayLengthPenalty?: readonly [number, number] | null;
  /** Token ids that are never chosen. */
  suppressTokens?: number | Ids | null;
  /** Token ids that are not chosen as the first. */
  beginSuppressTokens?: number | Ids | null;
  /** Number by which scores are divided before sampling; below 1 is less random. */
  temperature?: number | null;
  /** Sample from the most likely tokens, up to this fraction of the entropy (0 to 1). */
  topH?: number | null;
  /** Sample from the k most likely tokens; 0 is all (default 50, as in Hugging Face's). */
  topK?: number | null;
  /** Sample from the smallest set of likely tokens with this total probability (0 to 1). */
  topP?: number | null;
  /** Drop tokens less likely than this fraction of the most likely one (0 to 1). */
  minP?: number | null;
  /** Sample from the most typical tokens with this total probability (0 to 1). */
  typicalP?: number | null;
  /** Drop tokens less likely than this probability. */
  epsilonCutoff?: number | null;
  /** As epsilonCutoff, but lower where the entropy is high. */
  etaCutoff?: number | null;
  /** Make log-probabilities of the scores at the end. */
  renormalizeLogits?: boolean | null;
  /** Number of alternatives to report with each token's log-probability; without it neither is
   * reported. */
  logprobs?: number | null;
  /** Number of tokens to draft at a time from the text so far, which can save time and does not
   * change the answer. */
  promptLookupNumTokens?: number | null;
  /** Maximum length in tokens of the match that a draft continues (default 2). */
  maxMatchingNgramSize?: number | null;
  /**
   * Leave special tokens out of the text (default true). With false the text is that of
   * transformers' `decode(ids, skip_special_tokens=False)`, the stop token included.
   */
  skipSpecialTokens?: boolean | null;
}
