/** The loop between a search and the rows of a cache. */

import { expect, test } from 'vitest';
import { newSearch } from '../src/runtime/decoding/new-search.js';
import { optionsOf } from '../src/runtime/decoding/options.js';
import { stream, uniform } from '../src/runtime/decoding/rng.js';
import { generate } from '../src/runtime/generate.js';
import type { KeyValueCache } from '../src/runtime/graphs/cache.js';
import type { Request } from '../src/runtime/request.js';

const VOCAB = 12;

/** Logits that depend on all tokens of a row. */
function logitsOf(tokens: readonly number[]): Float32Array {
  let state = stream(
    tokens.reduce((sum, one) => (31 * sum + one + 1) >>> 0, 7),
    0,
  );
  return Float32Array.from({ length: VOCAB }, () => {
    const [number, after] = uniform(state);
    state = after;
    return 4 * number;
  });
}

/** Rows of tokens. `place` says where a cache puts the continuation of each source. */
function cacheOf(place: (sources: readonly number[]) => number[]) {
  let rows: number[][] = [[]];
  return {
    ropeDelta: 0,
    append: () => Promise.resolve([logitsOf(rows[0]!)]),
    reorder(sources: readonly number[]) {
      const places = place(sources);
      const before = rows;
      rows = [];
      places.forEach((row, i) => (rows[row] = [...before[sources[i]!]!]));
      return places;
    },
    step(tokens: readonly number[]) {
      tokens.forEach((token, row) => rows[row]!.push(token));
      return Promise.resolve(rows.map(logitsOf));
    },
  } as unknown as KeyValueCache;
}

/** As on a GPU: a row that continues in its place stays, others take the places that are free. */
function inPlace(sources: readonly number[]): number[] {
  const free = new Set(sources.keys());
  const places = sources.map(source => (free.delete(source) ? source : -1));
  return places.map(row => (row < 0 ? [...free].find(one => free.delete(one))! : row));
}

async function answers(
  options: Readonly<Record<string, unknown>>,
  place: (sources: readonly number[]) => number[],
) {
  const search = newSearch(optionsOf(options), {
    promptIds: [1],
    processorsSeePrompt: true,
    stopTokenIds: new Set([0]),
    maxNewTokens: 12,
    vocabSize: VOCAB,
    mask: null,
    isStopped: null,
  });
  const request = { search, positions: { ids: [], ropeDelta: 0 }, lookup: null } as object;
  const { signal } = new AbortController();
  for await (const _ of generate(cacheOf(place), request as Request, signal));
  return search.results();
}

test.each([
  { numBeams: 4, numReturnSequences: 4 },
  { numBeams: 5, numReturnSequences: 5, lengthPenalty: -1 },
  { numBeams: 3, numReturnSequences: 3, doSample: true, seed: 2 },
  { numReturnSequences: 5, doSample: true, seed: 1, temperature: 2 },
])('%j: the answers do not depend on the places of the rows', async options => {
  const gathered = await answers(options, sources => [...sources.keys()]);
  const backwards = await answers(options, sources => [...sources.keys()].reverse());
  expect(await answers(options, inPlace)).toEqual(gathered);
  expect(backwards).toEqual(gathered);
  expect(gathered.length).toBe(options.numReturnSequences);
});
