/**
 * The random stream, and sampling tokens with it (the twin of vlmport/runtime/decoding/rng.py).
 *
 * docs/decoding.md specifies both: the same seed and scores give the same tokens in Python. A state
 * is never changed in place, so a step that is aborted samples the same again.
 *
 * Source: xoshiro128** 1.1 (Blackman and Vigna, public domain), seeded by a 32-bit splitmix.
 */

import { best, highest } from './score-rows.js';

/** Four unsigned 32-bit words. */
export type State = readonly [number, number, number, number];

const GOLDEN = 0x9e3779b9; // 2 ** 32 over the golden ratio, the step of splitmix
const WEIGHT = 2 ** 32; // of the best token; 2 ** 21 tokens of it still sum exactly in float64
const LEAST = 24; // exp(-24) is below 2 ** -32: scores further below have no weight

/** Make an unpredictable seed below 2 ** 32. */
export function newSeed(): number {
  return crypto.getRandomValues(new Uint32Array(1))[0]!;
}

/** Return the first state of a request's n-th stream; each of its sequences has its own. */
export function stream(seed: number, sequence: number): State {
  const word = (place: number) => mixed((seed + Math.imul(4 * sequence + place, GOLDEN)) >>> 0);
  return [word(1), word(2), word(3), word(4)];
}

/** Mix 32 bits: each output bit depends on each input bit. */
function mixed(word: number): number {
  word = Math.imul(word ^ (word >>> 16), 0x21f0aaad);
  word = Math.imul(word ^ (word >>> 15), 0x735a2d97);
  return (word ^ (word >>> 15)) >>> 0;
}

/** Return 32 random bits, and the state after them. */
export function nextWord([a, b, c, d]: State): [number, State] {
  const word = Math.imul(rotated(Math.imul(b, 5), 7), 9) >>> 0;
  const [e, f] = [c ^ a, d ^ b];
  const after: State = [(a ^ f) >>> 0, (b ^ e) >>> 0, (e ^ (b << 9)) >>> 0, rotated(f, 11)];
  return [word, after];
}

const rotated = (word: number, by: number) => ((word << by) | (word >>> (32 - by))) >>> 0;

/** Return a multiple of 2 ** -53 from 0 to below 1, made of two words, and the state after. */
export function uniform(state: State): [number, State] {
  const [high, between] = nextWord(state);
  const [low, after] = nextWord(between);
  return [((high >>> 5) * 67108864 + (low >>> 6)) / 9007199254740992, after];
}

/**
 * Return the indices with a weight, in order, and their weights; one score must be finite.
 *
 * Weights are whole numbers in the ratio of exp(score), 2 ** 32 for the best. Tokens less than
 * 2 ** -32 as likely as the best have no weight. So sums are exact in any order, and a last bit of
 * `exp` that two languages round differently almost never has an effect.
 */
function weights(scores: Float32Array): { places: number[]; weighty: number[] } {
  const top = highest(scores);
  const least = Math.fround(top - LEAST);
  const [places, weighty]: [number[], number[]] = [[], []];
  for (let i = 0; i < scores.length; i++) {
    if (!(scores[i]! >= least)) continue;
    const weight = Math.floor(Math.exp(scores[i]! - top) * WEIGHT);
    if (weight > 0) {
      places.push(i);
      weighty.push(weight);
    }
  }
  return { places, weighty };
}

/** Sample one index in the ratio of exp(score), with one uniform number. */
export function draw(scores: Float32Array, state: State): [number, State] {
  const [drawn, after] = drawSeveral(scores, 1, state);
  return [drawn[0]!, after];
}

/**
 * Sample `count` different indices, one after the other, without replacement.
 *
 * Each takes one uniform number. When no weight is left, the best scores follow, without numbers.
 */
export function drawSeveral(scores: Float32Array, count: number, state: State): [number[], State] {
  const { places, weighty } = weights(scores);
  let total = 0;
  const upto = weighty.map(weight => (total += weight));
  const drawn: number[] = [];
  const gone: number[] = []; // in order
  while (drawn.length < count && total > 0) {
    const [part, after] = uniform(state);
    state = after;
    let ahead = Math.floor(part * total); // the sum of the remaining weights before the sampled one
    for (const at of gone) if (upto[at]! - weighty[at]! <= ahead) ahead += weighty[at]!;
    const at = firstAbove(upto, ahead);
    drawn.push(places[at]!);
    gone.splice(firstAbove(gone, at), 0, at);
    total -= weighty[at]!;
  }
  if (drawn.length < count) {
    const order = best(scores, Math.min(scores.length, count + drawn.length));
    const rest = order.filter(one => !drawn.includes(one));
    drawn.push(...rest.slice(0, count - drawn.length));
  }
  return [drawn, state];
}

/** Return the index of the first of ascending numbers that is above `bound`. */
function firstAbove(ascending: readonly number[], bound: number): number {
  let [low, high] = [0, ascending.length];
  while (low < high) {
    const middle = (low + high) >> 1;
    if (ascending[middle]! > bound) high = middle;
    else low = middle + 1;
  }
  return low;
}
