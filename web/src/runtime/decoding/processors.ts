/**
 * Process a row of scores before a token is chosen, as the options ask for (the twin of
 * vlmport/runtime/decoding/processors.py).
 *
 * Each function makes a processor from an option's value; `newProcessors` puts those that a request
 * needs in the order of Hugging Face's `generate`. A processor is a pure function: the same scores
 * after the same tokens give the same result. It may write to the scores that it gets.
 *
 * All arithmetic is float32, number by number: what is not stored in a Float32Array is rounded by
 * `Math.fround`.
 */

import { VlmportError, cut } from '../../errors.js';
import { DEFAULTS, type GenerationOptions, minNewTokensAfter } from './options.js';
import type { TokenIds } from './option-values.js';
import { FORBIDDEN, logSoftmax } from './score-rows.js';
import { newWarpers } from './warpers.js';

type Scores = Float32Array<ArrayBuffer>;

const { fround } = Math;
const OF_PROMPT = ['encoderRepetitionPenalty', 'encoderNoRepeatNgramSize'];
const LARGEST = (2 - 2 ** -23) * 2 ** 127; // of float32

/**
 * Returns which tokens may follow a row's new tokens: one byte for each token, 0 where it may not.
 * A pure function of them, because beams call it in any order; it may cache results.
 */
export type Mask = (tokens: readonly number[]) => Uint8Array;

/** The tokens before a row's next token. */
interface Row {
  /** All tokens that processors see: the prompt's, if they see it, and the new ones. */
  readonly seen: readonly number[];
  /** The new tokens. */
  readonly tokens: readonly number[];
}

export type Processor = (scores: Scores, row: Row) => Scores;

class TokensOfRow implements Row {
  private all: readonly number[] | null = null;

  constructor(
    private readonly prompt: readonly number[],
    readonly tokens: readonly number[],
  ) {}

  get seen(): readonly number[] {
    return (this.all ??= [...this.prompt, ...this.tokens]);
  }
}

/** All of a request's processors, in order. */
export class Processors {
  constructor(
    private readonly prompt: readonly number[],
    readonly inOrder: readonly Processor[],
  ) {}

  /** Process the scores of the token after `tokens`; `scores` may be written to. */
  process(scores: Scores, tokens: readonly number[]): Scores {
    const row = new TokensOfRow(this.prompt, tokens);
    for (const processor of this.inOrder) scores = processor(scores, row);
    return scores;
  }
}

/** What the processors of a request depend on, besides the options. */
export interface ProcessorFacts {
  readonly promptIds: readonly number[];
  readonly processorsSeePrompt: boolean;
  readonly stopTokenIds: ReadonlySet<number>;
  readonly maxNewTokens: number;
  readonly vocabSize: number;
  readonly mask: Mask | null;
}

/**
 * Make the processors that the options ask for, in order.
 *
 * Throws OptionError for token ids that are not below vocabSize, and for options that look at a
 * prompt where processors see none.
 */
export function newProcessors(options: GenerationOptions, facts: ProcessorFacts): Processors {
  const o = options;
  const { promptIds, processorsSeePrompt, stopTokenIds, maxNewTokens, vocabSize, mask } = facts;
  for (const [name, value] of Object.entries(o)) {
    checkServed(name, value, vocabSize, processorsSeePrompt);
  }
  const below = (ids: Iterable<number>) => [...ids].filter(one => one < vocabSize);
  const prompt = processorsSeePrompt ? promptIds : [];
  const stops = below(stopTokenIds);
  const least = minNewTokensAfter(o, promptIds.length);
  const found: Processor[] = [];
  const add = (wanted: unknown, make: () => Processor) => void (wanted && found.push(make()));
  add(o.sequenceBias.length, () => biased(o.sequenceBias));
  add(o.encoderRepetitionPenalty !== 1, () =>
    penalizedPrompt(1 / o.encoderRepetitionPenalty, below(prompt)),
  );
  add(o.repetitionPenalty !== 1, () => penalized(o.repetitionPenalty, vocabSize));
  add(o.presencePenalty || o.frequencyPenalty, () =>
    penalizedAnswer(o.presencePenalty, o.frequencyPenalty),
  );
  add(o.noRepeatNgramSize, () => noRepeatedNgrams(o.noRepeatNgramSize));
  add(o.encoderNoRepeatNgramSize, () => noNgramsOf(prompt, o.encoderNoRepeatNgramSize));
  add(o.badWordsIds.length, () => biased(forbiddenWords(o, stopTokenIds)));
  add(least && stops.length, () => forbiddenUntil(least, stops));
  add(mask, () => masked(mask!));
  add(o.forcedEosTokenId.length, () => forcedAt(maxNewTokens - 1, o.forcedEosTokenId));
  add(o.removeInvalidValues, () => valid);
  const decay = o.exponentialDecayLengthPenalty;
  add(decay && stops.length, () => likelier(decay![0], decay![1], stops));
  add(o.suppressTokens.length, () => forbiddenUntil(null, below(o.suppressTokens)));
  add(o.beginSuppressTokens.length, () => forbiddenUntil(1, below(o.beginSuppressTokens)));
  if (o.doSample) found.push(...newWarpers(o, o.numBeams > 1 ? stopTokenIds.size + 1 : 1));
  add(o.renormalizeLogits, () => logSoftmax);
  return new Processors(prompt, found);
}

/** Add to the score of each sequence's last token, if its other tokens come before it. */
export function biased(biases: readonly (readonly [TokenIds, number])[]): Processor {
  const alone = new Map<number, number>();
  const byLength = new Map<number, { before: TokenIds; token: number; bias: number }[]>();
  for (const [ids, bias] of biases) {
    const token = ids.at(-1)!;
    if (ids.length === 1) alone.set(token, fround(bias));
    else {
      const same = byLength.get(ids.length) ?? [];
      byLength.set(ids.length, same);
      same.push({ before: ids.slice(0, -1), token, bias: fround(bias) });
    }
  }
  const longer = [...byLength.values()].flat(); // the order in which Python adds them
  return (scores, { seen }) => {
    const added = new Map(alone);
    for (const { before, token, bias } of longer) {
      if (endsWith(seen, before)) added.set(token, fround((added.get(token) ?? 0) + bias));
    }
    for (const [token, bias] of added) scores[token]! += bias;
    return scores;
  };
}

const endsWith = (tokens: readonly number[], end: readonly number[]) =>
  end.length <= tokens.length &&
  end.every((one, i) => tokens[tokens.length - end.length + i] === one);

/** Make tokens that occurred before less likely (above 1). */
export function penalized(penalty: number, vocabSize: number): Processor {
  const factor = fround(penalty);
  return (scores, { seen }) =>
    penalize(
      scores,
      seen.filter(one => one < vocabSize),
      factor,
    );
}

/** Make the prompt's tokens less likely (above 1), or more likely (below 1). */
export function penalizedPrompt(penalty: number, prompt: readonly number[]): Processor {
  const factor = fround(penalty);
  return scores => penalize(scores, prompt, factor);
}

/**
 * Subtract `presence` from the score of each new token so far, and `frequency` for each time, as in
 * OpenAI's API.
 */
export function penalizedAnswer(presence: number, frequency: number): Processor {
  const [once, each] = [fround(presence), fround(frequency)];
  return (scores, { tokens }) => {
    const counts = new Map<number, number>();
    for (const token of tokens) counts.set(token, (counts.get(token) ?? 0) + 1);
    for (const [token, count] of counts) scores[token]! -= fround(fround(count * each) + once);
    return scores;
  };
}

function penalize(scores: Scores, ids: readonly number[], factor: number): Scores {
  for (const id of new Set(ids)) {
    if (scores[id]! < 0) scores[id]! *= factor;
    else scores[id]! /= factor;
  }
  return scores;
}

/** Forbid each token that would complete an n-gram that occurred before. */
export function noRepeatedNgrams(size: number): Processor {
  return (scores, { seen }) =>
    seen.length < size ? scores : forbid(scores, completing(seen, seen, size));
}

/** Forbid each token that would complete an n-gram of the prompt. */
export function noNgramsOf(prompt: readonly number[], size: number): Processor {
  return (scores, { seen }) =>
    seen.length < size - 1 ? scores : forbid(scores, completing(prompt, seen, size));
}

/** Find the tokens that follow, anywhere in `among`, the last size - 1 tokens of `seen`. */
function completing(among: readonly number[], seen: readonly number[], size: number): number[] {
  const last = size > 1 ? seen.slice(1 - size) : [];
  const found: number[] = [];
  for (let at = size - 1; at < among.length; at++) {
    if (last.every((one, i) => among[at - last.length + i] === one)) found.push(among[at]!);
  }
  return found;
}

/** Forbid some tokens; ids outside the vocabulary say nothing. */
function forbid(scores: Scores, ids: readonly number[]): Scores {
  for (const id of ids) if (id < scores.length) scores[id] = FORBIDDEN;
  return scores;
}

/** Forbid some tokens until there are `count` new tokens; null forbids them always. */
export function forbiddenUntil(count: number | null, ids: readonly number[]): Processor {
  return (scores, { tokens }) =>
    count === null || tokens.length < count ? forbid(scores, ids) : scores;
}

/** Forbid the tokens that the mask does not allow. */
export function masked(mask: Mask): Processor {
  return (scores, { tokens }) => {
    const allowed = mask(tokens);
    for (let i = 0; i < scores.length; i++) if (!allowed[i]) scores[i] = FORBIDDEN;
    return scores;
  };
}

/** Force one of `ids` as token number `count`, each with the same score. */
export function forcedAt(count: number, ids: readonly number[]): Processor {
  return (scores, { tokens }) => {
    if (tokens.length !== count) return scores;
    scores.fill(FORBIDDEN);
    for (const id of ids) scores[id] = 0;
    return scores;
  };
}

/** Replace NaN by 0, and infinities by the largest numbers. */
export function valid(scores: Scores): Scores {
  for (let i = 0; i < scores.length; i++) {
    const score = scores[i]!;
    if (Number.isNaN(score)) scores[i] = 0;
    else if (!Number.isFinite(score)) scores[i] = score > 0 ? LARGEST : -LARGEST;
  }
  return scores;
}

/** Past `start` new tokens, add |score| · (factor ** tokens past it - 1) to some scores. */
export function likelier(start: number, factor: number, ids: readonly number[]): Processor {
  return (scores, { tokens }) => {
    const past = tokens.length - start;
    if (past <= 0) return scores;
    const power = factor ** past;
    const growth = fround((power === Infinity ? LARGEST : power) - 1);
    for (const id of ids) {
      const old = scores[id]!;
      const grown = Number.isFinite(old) ? fround(old + fround(Math.abs(old) * growth)) : old;
      scores[id] = Math.min(grown, LARGEST); // sure to be chosen; infinity would be an error
    }
    return scores;
  };
}

/** Convert bad words to biases. A single stop token is not forbidden, as in Hugging Face's. */
function forbiddenWords(
  { badWordsIds }: GenerationOptions,
  stopTokenIds: ReadonlySet<number>,
): [TokenIds, number][] {
  return badWordsIds
    .filter(ids => ids.length > 1 || !stopTokenIds.has(ids[0]!))
    .map(ids => [ids, FORBIDDEN]);
}

/**
 * Throw OptionError for an option that this model can't serve.
 *
 * These are token ids outside the vocabulary (suppressed ones may be outside), and options that
 * look at the prompt where processors see none.
 */
export function checkServed(
  name: string,
  value: unknown,
  vocabSize: number,
  processorsSeePrompt: boolean,
): void {
  if (!processorsSeePrompt && OF_PROMPT.includes(name) && value !== DEFAULTS[name as 'topK']) {
    const message = `${name}=${value}: this model has no prompt tokens to look at`;
    const hint = 'leave it out; repetitionPenalty and noRepeatNgramSize see new tokens';
    throw new VlmportError('OptionError', 'option.not-for-this-model', message, hint);
  }
  let named: readonly number[] = [];
  if (name === 'forcedEosTokenId') named = value as TokenIds;
  else if (name === 'badWordsIds') named = (value as TokenIds[]).flat();
  else if (name === 'sequenceBias') {
    named = (value as GenerationOptions['sequenceBias']).flatMap(([ids]) => ids);
  }
  const wrong = [...new Set(named.filter(one => one >= vocabSize))].sort((a, b) => a - b);
  if (wrong.length) {
    const message = `${name}: ${cut(wrong.join(', '))} not in a vocabulary of ${vocabSize} tokens`;
    const hint = `use ids below ${vocabSize}, from this model's tokenizer`;
    throw new VlmportError('OptionError', 'option.wrong-value', message, hint);
  }
}
