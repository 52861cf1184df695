/** The tokens that a prompt has in common with a cache. */

import { expect, test } from 'vitest';
import { shared } from '../src/runtime/preparing.js';

const IMAGE = 9;
const prefix = (ids: number[], imageRows: string[] = []) => ({ ids, imageRows });

test.each([
  ['all of it', [1, 2, 3], [1, 2, 3, 4], 3],
  ['as far as ids are alike', [1, 2, 3], [1, 7, 3, 4], 1],
  ['one token is left for its logits', [1, 2, 3], [1, 2, 3], 2],
  ['less than the cache has', [1, 2, 3, 4, 5], [1, 2], 1],
  ['nothing', [1], [2], 0],
])('a prompt shares %s', (_, before, ids, count) => {
  expect(shared(prefix(before), ids, [], IMAGE)).toBe(count);
});

test('image tokens are equal where their images are', () => {
  const ids = [1, IMAGE, IMAGE, 2, IMAGE, 3];
  const before = prefix(ids, ['a', 'a', 'b']);
  expect(shared(before, [...ids, 4], ['a', 'a', 'b'], IMAGE)).toBe(6);
  expect(shared(before, [...ids, 4], ['a', 'a', 'c'], IMAGE)).toBe(4);
  expect(shared(before, [...ids, 4], ['c', 'c', 'b'], IMAGE)).toBe(1);
  // An image token that the model generated itself is text.
  expect(shared(prefix(ids, ['a', 'a']), [...ids, 4], ['a', 'a', 'b'], IMAGE)).toBe(4);
});
