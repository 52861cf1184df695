import { expect, test } from 'vitest';
import type { Components } from '../../src/runtime/graphs/components.js';
import { FeatureCache, type PromptImage } from '../../src/runtime/images/features.js';

const signal = new AbortController().signal;

/** Components that count what they encode: 100 bytes of features for each image. */
function counting(fails = false) {
  const encoded: string[] = [];
  const components = {
    encodeImage: (inputs: Record<string, unknown>) => {
      if (fails) return Promise.reject(new Error('lost'));
      encoded.push(Object.keys(inputs)[0]!);
      return Promise.resolve({ count: 1, width: 25, data: new Float32Array(25) });
    },
    positionInputs: ({ grid }: Record<string, unknown>) => (grid ? { grid } : {}),
  } as unknown as Components;
  return { components, encoded };
}

const image = (key: string, more = {}): PromptImage =>
  ({ key, promptIds: [], inputs: { [key]: 'pixels', ...more }, features: null }) as never;

test('an image with a known key is not encoded again', async () => {
  const { components, encoded } = counting();
  const cache = new FeatureCache(1000);
  for (const key of ['a', 'b', 'a']) await cache.encoded(components, image(key), signal);
  expect(encoded).toEqual(['a', 'b']);
  cache.clear();
  await cache.encoded(components, image('a'), signal);
  expect(encoded).toEqual(['a', 'b', 'a']);
});

test('the oldest images are removed, the most recently used are kept', async () => {
  const { components, encoded } = counting();
  const cache = new FeatureCache(250);
  for (const key of ['a', 'b', 'a', 'c', 'a', 'b']) {
    await cache.encoded(components, image(key), signal);
  }
  expect(encoded).toEqual(['a', 'b', 'c', 'b']);
  const none = new FeatureCache(50);
  const once = await none.encoded(components, image('d'), signal);
  await none.encoded(components, once, signal); // it has its features itself
  expect(encoded.slice(4)).toEqual(['d']);
});

test('pixels are removed, and the inputs of positions stay', async () => {
  const { components } = counting();
  const { inputs } = await new FeatureCache().encoded(
    components,
    image('a', { grid: [1, 2, 2] }),
    signal,
  );
  expect(inputs).toEqual({ grid: [1, 2, 2] });
});

test('an image whose encoding failed can be encoded by other components', async () => {
  const cache = new FeatureCache();
  const one = image('a');
  await expect(cache.encoded(counting(true).components, one, signal)).rejects.toThrow('lost');
  const { components, encoded } = counting();
  await cache.encoded(components, one, signal);
  expect(encoded).toEqual(['a']);
});
