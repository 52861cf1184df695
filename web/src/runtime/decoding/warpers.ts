/**
 * Options that narrow the tokens to sample from: temperature, top-k, top-p and the like (the twin
 * of vlmport/runtime/decoding/warpers.py).
 *
 * They apply to sampling only. Each keeps at least the best `keep` tokens, so that beam sampling
 * always finds one that is not a stop token. If several tokens are equal at the edge of the kept
 * ones, those with the lowest ids are kept; top-k keeps all of them.
 *
 * A warper may write to the scores that it gets. Sums are float64 and rounded to float32 once.
 */

import type { GenerationOptions } from './options.js';
import { FORBIDDEN, best, highest, logSoftmax, softmax, sumOf, taken } from './score-rows.js';

type Scores = Float32Array<ArrayBuffer>;
export type Warper = (scores: Scores) => Scores;

const { fround } = Math;
const ENTROPY_TOKENS = 100; // number of tokens that topH looks at
const FIRST_NUCLEUS = 256; // number of tokens that topP looks at first

/** Make the warpers that the options ask for, in the order of Hugging Face's `generate`. */
export function newWarpers(options: GenerationOptions, keep: number): Warper[] {
  const o = options;
  const warpers: Warper[] = [];
  if (o.temperature !== 1) warpers.push(temperature(o.temperature));
  if (o.topH !== null) warpers.push(topH(o.topH));
  if (o.topK) warpers.push(topK(Math.max(o.topK, keep)));
  if (o.topP < 1) warpers.push(topP(o.topP, keep));
  if (o.minP !== null) warpers.push(minP(o.minP, keep));
  if (o.typicalP < 1) warpers.push(typicalP(o.typicalP, keep));
  if (o.epsilonCutoff) warpers.push(epsilonCutoff(o.epsilonCutoff, keep));
  if (o.etaCutoff) warpers.push(etaCutoff(o.etaCutoff, keep));
  return warpers;
}

/** Divide the scores; below 1 the best tokens get even more likely. */
export function temperature(value: number): Warper {
  const divisor = fround(value);
  return scores => {
    for (let i = 0; i < scores.length; i++) scores[i]! /= divisor;
    return scores;
  };
}

/** Keep the `count` best tokens, and those equal to the last of them. */
export function topK(count: number): Warper {
  return scores => {
    if (count >= scores.length) return scores;
    const edge = scores[best(scores, count).at(-1)!]!;
    for (let i = 0; i < scores.length; i++) if (scores[i]! < edge) scores[i] = FORBIDDEN;
    return scores;
  };
}

/**
 * Keep the fewest best tokens whose probabilities reach `part`.
 *
 * A token is dropped if it and all less likely ones sum to at most 1 - part, summed from the least
 * likely on.
 */
export function topP(part: number, keep: number): Warper {
  const rest = fround(1 - part);
  return scores => {
    const left = possible(scores);
    if (left.length <= keep) return scores;
    const some = taken(scores, left);
    const probabilities = softmax(some);
    let [order, others]: [number[], number] = [[], 0];
    // Look at the best only: all others are dropped anyway.
    for (let count = FIRST_NUCLEUS; ; count *= 8) {
      order = best(some, count);
      others = sumWithout(probabilities, order);
      if (fround(others) <= rest) break;
    }
    let kept = 0;
    let upwards = 0;
    for (let i = order.length - 1; i >= 0; i--) {
      upwards += probabilities[order[i]!]!;
      if (fround(others + upwards) > rest) kept++;
    }
    const nucleus = order.slice(0, Math.max(kept, keep));
    return only(
      scores,
      nucleus.map(at => left[at]!),
    );
  };
}

/** Keep tokens with at least `part` of the best token's probability. */
export function minP(part: number, keep: number): Warper {
  const factor = fround(part);
  return scores => {
    const left = possible(scores);
    if (left.length <= keep) return scores;
    const some = taken(scores, left);
    const probabilities = softmax(some);
    const least = fround(factor * highest(probabilities));
    const always = new Set(best(some, keep));
    return only(
      scores,
      left.filter((_, i) => probabilities[i]! >= least || always.has(i)),
    );
  };
}

/** Keep the tokens whose surprise is nearest to the mean surprise, `mass` of probability. */
export function typicalP(mass: number, keep: number): Warper {
  return scores => {
    const left = possible(scores);
    if (left.length <= keep) return scores;
    const some = taken(scores, left);
    const surprise = logSoftmax(some).map(one => -one);
    const mean = fround(sumOf(surprise.map(one => one * fround(Math.exp(-one)))));
    const oddness = surprise.map(one => Math.abs(fround(one - mean)));
    const order = [...oddness.keys()].sort((a, b) => oddness[a]! - oddness[b]! || a - b);
    const probabilities = softmax(some);
    let sum = 0;
    let last = 0;
    for (const at of order) {
      sum += probabilities[at]!;
      if (fround(sum) < fround(mass)) last++;
    }
    const edge = oddness[order[Math.min(last, left.length - 1)]!]!;
    const typical = order.filter((at, i) => i < keep || oddness[at]! <= edge);
    return only(
      scores,
      typical.map(at => left[at]!),
    );
  };
}

/** Keep tokens with at least this probability. */
export function epsilonCutoff(epsilon: number, keep: number): Warper {
  const least = fround(epsilon);
  return scores => cut(scores, keep, () => least);
}

/** Keep tokens with at least the probability min(epsilon, sqrt(epsilon) · exp(-entropy)). */
export function etaCutoff(epsilon: number, keep: number): Warper {
  const least = fround(epsilon);
  const root = fround(Math.sqrt(least));
  const eta = (probabilities: Float32Array) => {
    const entropy = fround(sumOf(entropyTerms(probabilities)));
    return Math.min(least, fround(root * fround(Math.exp(-entropy))));
  };
  return scores => cut(scores, keep, eta);
}

/** Keep the best of 100 tokens whose entropy terms sum to at most `part` of the entropy. */
export function topH(part: number): Warper {
  return scores => {
    const few = best(scores, Math.min(ENTROPY_TOKENS, scores.length));
    const order = few.filter(at => scores[at]! > FORBIDDEN);
    if (!order.length) return scores;
    const probabilities = softmax(taken(scores, order));
    const terms = entropyTerms(probabilities);
    const most = fround(fround(sumOf(terms)) * fround(part));
    let sum = 0;
    const kept = order.filter((_, i) => {
      sum += terms[i]!;
      // A probability of 0 adds nothing, so it would always be kept.
      return i === 0 || (fround(sum) <= most && probabilities[i]! > 0);
    });
    return only(scores, kept);
  };
}

/** Forbid tokens less likely than `least`, except the `keep` best and their equals. */
function cut(scores: Scores, keep: number, least: (probabilities: Float32Array) => number): Scores {
  const left = possible(scores);
  if (left.length <= keep) return scores;
  const some = taken(scores, left);
  const probabilities = softmax(some);
  const edge = some[best(some, keep).at(-1)!]!;
  const bound = least(probabilities);
  left.forEach((at, i) => {
    if (probabilities[i]! < bound && some[i]! < edge) scores[at] = FORBIDDEN;
  });
  return scores;
}

/** Compute -p · log(p), which is 0 where p is 0. */
function entropyTerms(probabilities: Float32Array): Float32Array {
  return Float32Array.from(probabilities, p => (p > 0 ? -p * fround(Math.log(p)) : 0));
}

/** Sum all values except some, in float64. */
function sumWithout(values: Float32Array, without: readonly number[]): number {
  const others = Float64Array.from(values);
  for (const at of without) others[at] = 0;
  return sumOf(others);
}

/** List the tokens that can be chosen. */
function possible(scores: Scores): number[] {
  const left: number[] = [];
  for (let i = 0; i < scores.length; i++) if (scores[i]! > FORBIDDEN) left.push(i);
  return left;
}

/** Forbid all tokens except some. */
function only(scores: Scores, kept: readonly number[]): Scores {
  const left = new Float32Array(scores.length).fill(FORBIDDEN);
  for (const at of kept) left[at] = scores[at]!;
  return left;
}
