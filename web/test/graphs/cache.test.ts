import { expect, test } from 'vitest';
import { cuts } from '../../src/runtime/graphs/cache.js';

test.each([
  [1, [1]],
  [288, [288]], // a last chunk below half is part of the one before
  [289, [192, 289]],
  [480, [192, 480]],
  [876, [192, 384, 576, 768, 876]],
])('a prompt of %i tokens is cut where Python cuts it', (length, ends) => {
  expect(cuts(length, 192)).toEqual(ends);
});

test('without a limit there is one chunk', () => {
  expect(cuts(5000, Infinity)).toEqual([5000]);
});
