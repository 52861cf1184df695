/** The reason that a graph gives for refusing its input. */

import { expect, test } from 'vitest';
import { refusal } from '../../src/runtime/graphs/refusals.js';

const FAILED = 'failed to call OrtRun(). ERROR_CODE: 2, ERROR_MESSAGE: Non-zero status code';

test('a graph that refuses its input is quoted with its hint', () => {
  const name = "refused: it's more than 5: see 'x' | take less";
  const message = `${FAILED} returned while running Gather node. Name:'${name}' Status Message: idx`;
  expect(refusal(new Error(message), 'other')).toEqual(["it's more than 5: see 'x'", 'take less']);
});

test('any other error is its first line', () => {
  const error = new Error("Name:'node_Gather_3' Status Message: idx=9\nmore");
  expect(refusal(error, 'a hint')).toEqual([
    "Name:'node_Gather_3' Status Message: idx=9",
    'a hint',
  ]);
  expect(refusal('text', 'a hint')).toEqual(['text', 'a hint']);
});
