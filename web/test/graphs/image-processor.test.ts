/** Errors of the image processor's graph are Python's. */

import * as common from 'onnxruntime-common';
import { expect, test } from 'vitest';
import { optionFeeds, processImage } from '../../src/runtime/graphs/image-processor.js';
import type { Ort, Session } from '../../src/runtime/graphs/sessions.js';

const ort = common as unknown as Ort;
const rgb = { width: 2, height: 1, data: new Uint8Array(6) };

function graph(run: () => Promise<object>): Session {
  const inputs = { image: 'uint8', do_image_splitting: 'bool', max_pixels: 'int64' };
  const inputMetadata = Object.entries(inputs).map(([name, type]) => {
    return { name, isTensor: true, type, shape: [] };
  });
  return { run, inputMetadata } as unknown as Session;
}

test('a graph without prompt_ids is a bad bundle, not a bad image', async () => {
  const session = graph(() => Promise.resolve({}));
  const error = { kind: 'BundleError', code: 'bundle.wrong-graph' };
  await expect(processImage(ort, session, rgb, {})).rejects.toMatchObject(error);
});

test('an image that the graph refuses is named by its size', async () => {
  const session = graph(() => Promise.reject(new Error('no')));
  const error = { kind: 'ImageError', code: 'image.refused', message: /2x1/ };
  const found = await processImage(ort, session, rgb, {}).catch((error: unknown) => error);
  expect(found).toMatchObject({ ...error, message: expect.stringMatching(error.message) });
});

test.each([
  [{ do_image_spliting: false }, 'option.unknown', /do_image_splitting/],
  [{ max_pixels: true }, 'option.wrong-value', /max_pixels=true/],
  [{ max_pixels: 0.5 }, 'option.wrong-value', /max_pixels=0.5/],
  [{ do_image_splitting: 1 }, 'option.wrong-value', /do_image_splitting=1/],
])('%j is refused', (options, code, message) => {
  const session = graph(() => Promise.resolve({}));
  const error = { code, message: expect.stringMatching(message) };
  expect(() => optionFeeds(ort, session, options as never)).toThrow(expect.objectContaining(error));
});
