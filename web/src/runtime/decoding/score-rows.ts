/**
 * Maths on rows of scores: the best tokens, and probabilities (the twin of
 * vlmport/runtime/decoding/score_rows.py).
 *
 * Of equal scores, the one with the lowest index counts as the better. Exponentials and their sums
 * are float64 and rounded to float32 once. docs/decoding.md, "Numbers", says how both languages
 * round.
 */

export const FORBIDDEN = -Infinity; // the score of a token that can't be chosen

/** Return the index of the highest score (the first of several), or of the first NaN. */
export function argmax(scores: Float32Array): number {
  let at = 0;
  let top = scores[0]!;
  for (let i = 0; i < scores.length; i++) {
    const score = scores[i]!;
    if (score > top) {
      at = i;
      top = score;
    } else if (score !== score) return i;
  }
  return at;
}

/** Return the highest score; NaN where there is one. */
export function highest(scores: Float32Array): number {
  return scores.length ? scores[argmax(scores)]! : -Infinity;
}

/**
 * Return the indices of the highest scores, highest first; of equals the lowest index first.
 *
 * A heap of `count` indices: nearly all scores are compared with its lowest one only.
 */
export function best(scores: Float32Array, count: number): number[] {
  if (count >= scores.length) return ordered(scores, [...scores.keys()]);
  if (count < 1) return [];
  // The root is the worst of those kept: the lowest score, of equals the highest index.
  const heap = new Uint32Array(count);
  const isWorse = (a: number, b: number) =>
    scores[a]! < scores[b]! || (scores[a]! === scores[b]! && a > b);
  const sink = (from: number) => {
    const index = heap[from]!;
    let at = from;
    for (let child = 2 * at + 1; child < count; child = 2 * at + 1) {
      if (child + 1 < count && isWorse(heap[child + 1]!, heap[child]!)) child++;
      if (!isWorse(heap[child]!, index)) break;
      heap[at] = heap[child]!;
      at = child;
    }
    heap[at] = index;
  };
  for (let i = 0; i < count; i++) heap[i] = i;
  for (let i = (count >> 1) - 1; i >= 0; i--) sink(i);
  let edge = scores[heap[0]!]!;
  for (let i = count; i < scores.length; i++) {
    if (!(scores[i]! > edge)) continue;
    heap[0] = i;
    sink(0);
    edge = scores[heap[0]]!;
  }
  return ordered(scores, [...heap]);
}

/** Sort indices by their scores, highest first; of equals the lowest index first. */
function ordered(scores: Float32Array, indices: number[]): number[] {
  return indices.sort((a, b) => {
    const [one, other] = [scores[a]!, scores[b]!];
    return one === other ? a - b : one > other ? -1 : 1; // both may be -Infinity
  });
}

/** Compute log-probabilities. A row of -Infinity alone stays; a row with NaN or +Infinity is NaN. */
export function logSoftmax(scores: Float32Array): Float32Array<ArrayBuffer> {
  const top = highest(scores);
  if (top === -Infinity) return Float32Array.from(scores);
  let sum = 0;
  for (let i = 0; i < scores.length; i++) sum += Math.exp(scores[i]! - top);
  const total = Math.log(sum);
  return Float32Array.from(scores, score => score - top - total);
}

/** Compute probabilities; at least one score must be finite. */
export function softmax(scores: Float32Array): Float32Array<ArrayBuffer> {
  const top = highest(scores);
  const weights = Float64Array.from(scores, score => Math.exp(score - top));
  const total = sumOf(weights);
  return Float32Array.from(weights, weight => weight / total);
}

/** Sum numbers in float64. */
export function sumOf(numbers: Float32Array | Float64Array): number {
  let sum = 0;
  for (let i = 0; i < numbers.length; i++) sum += numbers[i]!;
  return sum;
}

/** Select numbers by their indices. */
export function taken(
  numbers: Float32Array,
  indices: readonly number[],
): Float32Array<ArrayBuffer> {
  return Float32Array.from(indices, index => numbers[index]!);
}
