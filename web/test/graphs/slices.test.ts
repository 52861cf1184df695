import * as common from 'onnxruntime-common';
import { expect, test } from 'vitest';
import type { Ort, Session, Tensor } from '../../src/runtime/graphs/sessions.js';
import {
  firstOfAxis,
  gathered,
  joinedTensors,
  scalar,
  slices,
} from '../../src/runtime/graphs/slices.js';

const ort = common as unknown as Ort;

function inputs(shapes: Record<string, (string | number)[]>): Session['inputMetadata'] {
  const named = Object.entries(shapes);
  return named.map(([name, shape]) => ({ name, isTensor: true, type: 'float32', shape }));
}

function counting(...dims: number[]): Tensor {
  const size = dims.reduce((a, b) => a * b, 1);
  const values = Float32Array.from({ length: size }, (_, i) => i);
  return new ort.Tensor('float32', values, dims);
}

const read = (parts: Iterable<Record<string, Tensor>>) =>
  [...parts].map(part =>
    Object.values(part).map(({ dims, data }) => [dims, Array.from(data as Float32Array)]),
  );

test('the named axis is cut index by index, at any place', () => {
  const shapes = inputs({ x: ['batch_size', 'tiles', 2], mask: ['tiles'] });
  const feeds = { x: counting(1, 3, 2), mask: counting(3) };
  expect(read(slices(ort, shapes, feeds, 'tiles'))).toEqual(
    [0, 1, 2].map(i => [
      [
        [1, 1, 2],
        [2 * i, 2 * i + 1],
      ],
      [[1], [i]],
    ]),
  );
  const batch = { x: counting(2, 2, 2), mask: counting(2) };
  expect(read(slices(ort, shapes, batch, 'tiles'))[1]![0]).toEqual([
    [2, 1, 2],
    [2, 3, 6, 7],
  ]);
});

test.each([
  ['an input without the axis', { x: ['tiles', 2], scale: ['n'] }, [3, 2], [3]],
  ['two lengths', { x: ['tiles', 2], scale: ['tiles'] }, [3, 2], [2]],
])('%s: all at once', (_, shapes, x, scale) => {
  const feeds = { x: counting(...x), scale: counting(...scale) };
  const [part, ...more] = slices(ort, inputs(shapes), feeds, 'tiles');
  expect(more).toEqual([]);
  expect([part!.x!.dims, part!.scale!.dims]).toEqual([x, scale]);
});

test('a number as a tensor of each type', () => {
  const told = (tensor: Tensor) => [
    tensor.type,
    tensor.dims,
    Array.from(tensor.data as Int32Array),
  ];
  expect(told(scalar(ort, 'bool', true))).toEqual(['bool', [], [1]]);
  expect(told(scalar(ort, 'int64', 7))).toEqual(['int64', [], [7n]]);
  expect(told(scalar(ort, 'float32', 0.5))).toEqual(['float32', [], [0.5]]);
  expect(told(scalar(ort, 'int32', 3))).toEqual(['int32', [], [3]]);
});

test('the first indices of an axis', () => {
  const cut = firstOfAxis(ort, counting(1, 2, 3, 2), 2, 2);
  expect([cut.dims, Array.from(cut.data as Float32Array)]).toEqual([
    [1, 2, 2, 2],
    [0, 1, 2, 3, 6, 7, 8, 9],
  ]);
  expect(firstOfAxis(ort, counting(1, 2, 3, 2), 2, 0).dims).toEqual([1, 2, 0, 2]);
});

test('grids of several images are joined, and are empty without images', () => {
  const [grid] = inputs({ grid: ['num_images', 3] }).map(one => ({ ...one, type: 'int64' }));
  const input = grid as Session['inputMetadata'][number];
  const of = (...numbers: bigint[]) => ({
    grid: new ort.Tensor('int64', BigInt64Array.from(numbers), [numbers.length / 3, 3]),
  });
  const joined = joinedTensors(ort, input, [of(1n, 2n, 4n), of(1n, 6n, 8n, 1n, 2n, 2n)]);
  expect(joined.dims).toEqual([3, 3]);
  expect(joined.data).toEqual(BigInt64Array.of(1n, 2n, 4n, 1n, 6n, 8n, 1n, 2n, 2n));
  expect(joinedTensors(ort, input, []).dims).toEqual([0, 3]);
  const error = expect.objectContaining({
    code: 'bundle.wrong-graph',
    message: expect.stringMatching(/'grid' int64\[num_images,3\]/),
  });
  expect(() => joinedTensors(ort, input, [{}])).toThrow(error);
  expect(() => joinedTensors(ort, input, [{ grid: counting(1, 3) }])).toThrow(error);
});

test('rows are gathered in any order, and the source stays', () => {
  const tensor = counting(3, 1, 2);
  const rows = gathered(ort, tensor, [2, 0, 2, 2]);
  expect(rows.dims).toEqual([4, 1, 2]);
  expect([...(rows.data as Float32Array)]).toEqual([4, 5, 0, 1, 4, 5, 4, 5]);
  (rows.data as Float32Array)[0] = 9;
  expect((tensor.data as Float32Array)[4]).toBe(4);
  const half = new ort.Tensor('float16', Uint16Array.of(1, 2), [2, 1]);
  expect([...(gathered(ort, half, [1]).data as unknown as Uint16Array)]).toEqual([2]);
});
