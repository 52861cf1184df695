import { expect, test } from 'vitest';
import { didYouMean } from '../src/errors.js';
import { argmax } from '../src/runtime/decoding/score-rows.js';
import { onWhite } from '../src/runtime/images/reading.js';
import { halfToNumber, mergeImageFeatures } from '../src/runtime/graphs/rows.js';

test('transparency is blended with white as in Pillow', () => {
  // From Pillow 13: Image.alpha_composite(white, one) for [value, alpha].
  const rows: [number, number, number][] = [
    [0, 0, 255],
    [200, 0, 255],
    [0, 1, 254],
    [0, 127, 128],
    [0, 128, 127],
    [10, 200, 63],
    [100, 50, 225],
    [250, 3, 255],
    [77, 254, 78],
    [123, 255, 123],
  ];
  const rgba = Uint8Array.from(rows.flatMap(([value, alpha]) => [value, value, value, alpha]));
  const wanted = rows.flatMap(([, , result]) => [result, result, result]);
  expect([...onWhite(rgba)]).toEqual(wanted);
});

test('features are written over the image tokens, in order', () => {
  const embeds = { count: 4, width: 2, data: Float32Array.of(1, 1, 2, 2, 3, 3, 4, 4) };
  const one = { count: 1, width: 2, data: Float32Array.of(7, 8) };
  const merged = mergeImageFeatures(embeds, [9, 5, 9, 6], [one, one], 9);
  expect([...merged]).toEqual([7, 8, 2, 2, 7, 8, 4, 4]);
  expect(embeds.data[0]).toBe(1);
  const wide = { count: 1, width: 1, data: Float32Array.of(7) };
  expect(() => mergeImageFeatures(embeds, [9, 5, 9, 6], [one], 9)).toThrow(
    expect.objectContaining({
      code: 'prompt.wrong-features',
      message: expect.stringMatching(/^2 .* 1 /),
    }),
  );
  expect(() => mergeImageFeatures(embeds, [9, 5, 5, 6], [wide], 9)).toThrow(
    expect.objectContaining({
      code: 'prompt.wrong-features',
      message: expect.stringMatching(/ 1, .* 2$/),
    }),
  );
});

test('16-bit floats', () => {
  const cases = [0, 0x8000, 0x3c00, 0xc000, 0x3555, 0x0001, 0x03ff, 0x7bff, 0x7c00, 0xfc00];
  expect(cases.map(halfToNumber)).toEqual([
    0,
    -0,
    1,
    -2,
    0.333251953125,
    2 ** -24,
    1023 * 2 ** -24,
    65504,
    Infinity,
    -Infinity,
  ]);
  expect(halfToNumber(0x7e00)).toBeNaN();
});

test('the best score is the first of several, and a NaN is not ignored', () => {
  expect(argmax(Float32Array.of(-2, -1, -1))).toBe(1);
  expect(argmax(Float32Array.of(3, NaN, 4))).toBe(1);
});

test('the nearest known name', () => {
  expect(didYouMean('precison', ['device', 'precision'])).toBe(" (did you mean 'precision'?)");
  expect(didYouMean('beams', ['device', 'precision'])).toBe('');
});
