import { expect, test } from 'vitest';
import { scalesByCall } from '../../src/runtime/graphs/decoder.js';

const bytes = (text: string) => new TextEncoder().encode(text);

test.each([
  ['"\u0015DynamicQuantizeLinear:', true],
  ['DDDynamicDynamicQuantizeLinear', true],
  ['DynamicQuantizeLinea', false],
  ['MatMulNBits, QuantizeLinear', false],
  ['', false],
])('%j scales activations by all rows of a call: %s', (graph, scales) => {
  expect(scalesByCall(bytes(graph))).toBe(scales);
});
