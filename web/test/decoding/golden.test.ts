/**
 * Recorded logits and what Python makes of them (testdata/golden, written by tests/decoding): the
 * same tokens, parents and stop reasons, for every option in every mode.
 */

import { readFileSync } from 'node:fs';
import { expect, test } from 'vitest';
import { newSearch } from '../../src/runtime/decoding/new-search.js';
import { camelCase } from '../../src/runtime/decoding/foreign-options.js';
import { optionsOf } from '../../src/runtime/decoding/options.js';
import { best } from '../../src/runtime/decoding/score-rows.js';
import { newWarpers } from '../../src/runtime/decoding/warpers.js';
import { drawSeveral, nextWord, stream, uniform } from '../../src/runtime/decoding/rng.js';
import type { State } from '../../src/runtime/decoding/rng.js';

interface Case {
  readonly name: string;
  readonly options: Readonly<Record<string, unknown>>;
  readonly prompt_ids: number[];
  readonly processors_see_prompt: boolean;
  readonly stop_token_ids: number[];
  readonly max_new_tokens: number;
  readonly vocab_size: number;
  readonly steps: { logits: string; tokens: number[]; parents: number[] }[];
  readonly results: {
    tokens: number[];
    stop_reason: string;
    score?: number;
    logprobs?: { logprob: number; top: [number, number][] }[];
  }[];
}

interface Random {
  readonly 'xoshiro128**': { state: State; words: number[] };
  readonly streams: {
    seed: number;
    sequence: number;
    state: State;
    words: number[];
    uniform: number[];
  }[];
  readonly draws: { seed: number; scores: number[]; count: number; drawn: number[] }[];
}

function read<T>(name: string): T {
  const url = new URL(`../../../testdata/golden/${name}.json`, import.meta.url);
  return JSON.parse(readFileSync(url, 'utf8')) as T;
}

/** Rows of float32 from base64. */
function rowsOf(text: string, width: number): Float32Array[] {
  const numbers = new Float32Array(Uint8Array.from(Buffer.from(text, 'base64')).buffer);
  return Array.from({ length: numbers.length / width }, (_, row) =>
    numbers.subarray(row * width, (row + 1) * width),
  );
}

const files = ['greedy', 'sampling', 'beams', 'beam_sampling'];
const cases = files.flatMap(name => read<{ cases: Case[] }>(name).cases);

test('the files have cases of every mode', () => {
  expect(cases.length).toBeGreaterThan(110);
});

test.each(cases.map(one => [one.name, one] as const))('%s', (_, one) => {
  const options = Object.entries(one.options).map(([name, value]) => [camelCase(name), value]);
  const search = newSearch(optionsOf(Object.fromEntries(options)), {
    promptIds: one.prompt_ids,
    processorsSeePrompt: one.processors_see_prompt,
    stopTokenIds: new Set(one.stop_token_ids),
    maxNewTokens: one.max_new_tokens,
    vocabSize: one.vocab_size,
    mask: null,
    isStopped: null,
  });
  for (const { logits, ...choice } of one.steps) {
    expect(search.done).toBe(false);
    expect(search.choose(rowsOf(logits, one.vocab_size))).toEqual(choice);
  }
  expect(search.done).toBe(true);
  expect(search.steps).toBe(one.steps.length);
  const found = search.results();
  const { results } = one;
  expect(found.map(({ tokens }) => tokens)).toEqual(results.map(({ tokens }) => tokens));
  expect(found.map(({ stopReason }) => stopReason)).toEqual(
    results.map(({ stop_reason }) => stop_reason),
  );
  results.forEach(({ score, logprobs }, i) => {
    if (score === undefined) expect(found[i]!.score).toBeNull();
    else expect(Math.abs(found[i]!.score! - score)).toBeLessThan(1e-5);
    expect(found[i]!.logprobs?.length).toBe(logprobs?.length);
    logprobs?.forEach(({ logprob, top }, place) => {
      const report = found[i]!.logprobs![place]!;
      expect(Math.abs(report.logprob - logprob)).toBeLessThan(1e-5);
      expect(report.top.map(([token]) => token)).toEqual(top.map(([token]) => token));
      report.top.forEach(([, value], n) => expect(Math.abs(value - top[n]![1])).toBeLessThan(1e-5));
    });
  });
});

/** Take `count` numbers, one after the other. */
function several<T>(step: (state: State) => [T, State], state: State, count: number): T[] {
  return Array.from({ length: count }, () => {
    const [value, after] = step(state);
    state = after;
    return value;
  });
}

interface Large {
  readonly row: { vocab_size: number; scale: number; seed: number; best: number[] };
  readonly cases: {
    options: Readonly<Record<string, unknown>>;
    kept: number;
    sum: number;
    tokens: number[];
  }[];
}

const large = read<Large>('large');

/** A row of random scores, the same as in Python. */
function largeRow({ vocab_size, scale, seed }: Large['row']): Float32Array<ArrayBuffer> {
  const numbers = several(uniform, stream(seed, 0), 3 * vocab_size);
  return Float32Array.from({ length: vocab_size }, (_, n) => {
    const [u, v, w] = numbers.slice(3 * n, 3 * n + 3) as [number, number, number];
    return (u + v + w - 1.5) * scale;
  });
}

test('the best of many tokens are those of Python', () => {
  expect(best(largeRow(large.row), large.row.best.length)).toEqual(large.row.best);
});

test.each(large.cases.map(one => [JSON.stringify(one.options), one] as const))(
  'of many tokens %s keeps and samples those of Python',
  (_, { options: given, kept, sum, tokens }) => {
    const row = largeRow(large.row);
    const pairs = Object.entries(given).map(([name, value]) => [camelCase(name), value]);
    const options = optionsOf(Object.fromEntries(pairs));
    let scores = Float32Array.from(row);
    for (const warper of newWarpers(options, 1)) scores = warper(scores);
    const left = [...scores.keys()].filter(at => scores[at]! > -Infinity);
    expect([left.length, left.reduce((a, b) => a + b, 0)]).toEqual([kept, sum]);
    const search = newSearch(options, {
      promptIds: [1],
      processorsSeePrompt: true,
      stopTokenIds: new Set([0]),
      maxNewTokens: 1,
      vocabSize: row.length,
      mask: null,
      isStopped: null,
    });
    search.choose([row]);
    expect(search.results().map(one => one.tokens[0])).toEqual(tokens);
  },
);

test('the random stream is that of Python', () => {
  const random = read<Random>('random');
  const { state, words } = random['xoshiro128**'];
  expect(several(nextWord, state, words.length)).toEqual(words);
  for (const one of random.streams) {
    const first = stream(one.seed, one.sequence);
    expect(first).toEqual(one.state);
    expect(several(nextWord, first, one.words.length)).toEqual(one.words);
    expect(several(uniform, first, one.uniform.length)).toEqual(one.uniform);
  }
  for (const { seed, scores, count, drawn } of random.draws) {
    expect(drawSeveral(Float32Array.from(scores), count, stream(seed, 0))[0]).toEqual(drawn);
  }
});
