/** Errors of images given by address. */

import { expect, test } from 'vitest';

import { openImage } from '../../src/runtime/images/reading.js';

const BAD: readonly (readonly [string, string])[] = [
  ['data:image/png', 'image.bad-data-address'],
  ['data:image/png;base64', 'image.bad-data-address'],
  ['data:image/png;base64,iVBOR*0', 'image.bad-base64'],
  ['data:image/png;base64,', 'image.empty'],
  ['data:text/plain,words', 'image.not-a-picture'],
  ['nowhere:image.png', 'image.not-fetched'],
];

test.each(BAD)('%s is %s', async (url, code) => {
  const opened = openImage({ kind: 'url', url }, new AbortController().signal);
  await expect(opened).rejects.toMatchObject({ kind: 'ImageError', code });
});
