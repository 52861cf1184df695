/** Cut tensors along an axis, join them along the first, and convert numbers to tensors. */

import { VlmportError } from '../../errors.js';
import type { Ort, Session, Tensor, TensorData, TensorType } from './sessions.js';

/** The numbers of a tensor: a typed array. */
type Numbers = Exclude<TensorData, string[]>;

/**
 * Cut feeds along the axis that their inputs call `name`, index by index. They are yielded whole,
 * once, where not every input has the axis, or its lengths differ. The caller owns the tensors.
 */
export function* slices(
  ort: Ort,
  inputs: Session['inputMetadata'],
  feeds: Readonly<Record<string, Tensor>>,
  name: string,
): Generator<Record<string, Tensor>, void, undefined> {
  const axes = inputs.map(one => (one.isTensor ? one.shape.indexOf(name) : -1));
  const counts = new Set(inputs.map((one, i) => feeds[one.name]?.dims[axes[i]!]));
  const [count] = counts;
  const apart = counts.size === 1 && count !== undefined && !axes.includes(-1);
  for (let index = 0; index < (apart ? count : 1); index++) {
    const part = inputs.map(({ name }, i): [string, Tensor] => {
      const tensor = feeds[name]!;
      if (!apart) return [name, new ort.Tensor(tensor.type, tensor.data, tensor.dims)];
      return [name, sliceOf(ort, tensor, axes[i]!, index)];
    });
    yield Object.fromEntries(part);
  }
}

/** Select one index of an axis, which stays with a length of 1. */
function sliceOf(ort: Ort, { type, data, dims }: Tensor, axis: number, index: number): Tensor {
  const product = (sizes: readonly number[]) => sizes.reduce((a, b) => a * b, 1);
  const [outer, inner] = [product(dims.slice(0, axis)), product(dims.slice(axis + 1))];
  const numbers = data as Numbers;
  const count = dims[axis] ?? 1;
  const rows = (at: number) => numbers.subarray(at * inner, (at + 1) * inner);
  const cut = outer === 1 ? rows(index) : numbers.slice(0, outer * inner);
  for (let i = 0; outer > 1 && i < outer; i++) {
    (cut as Uint8Array).set(rows(i * count + index) as Uint8Array, i * inner);
  }
  return new ort.Tensor(type, cut, dims.with(axis, 1));
}

/** Copy the first `length` indices of an axis to a new tensor. */
export function firstOfAxis(
  ort: Ort,
  { type, data, dims }: Tensor,
  axis: number,
  length: number,
): Tensor {
  const product = (sizes: readonly number[]) => sizes.reduce((a, b) => a * b, 1);
  const [outer, inner] = [product(dims.slice(0, axis)), product(dims.slice(axis + 1))];
  const numbers = data as Numbers;
  const cut = numbers.slice(0, outer * length * inner);
  for (let i = 1; i < outer; i++) {
    const start = i * (dims[axis] ?? 0) * inner;
    (cut as Uint8Array).set(
      numbers.subarray(start, start + length * inner) as Uint8Array,
      i * length * inner,
    );
  }
  return new ort.Tensor(type, cut, dims.with(axis, length));
}

/** Copy some indices of the first axis to a new tensor, in the order given. */
export function gathered(
  ort: Ort,
  { type, data, dims }: Tensor,
  indices: readonly number[],
): Tensor {
  const inner = dims.slice(1).reduce((a, b) => a * b, 1);
  const numbers = data as Numbers;
  const rows = new (numbers.constructor as { new (length: number): Numbers })(
    indices.length * inner,
  );
  indices.forEach((index, i) => {
    const row = numbers.subarray(index * inner, (index + 1) * inner);
    (rows as Uint8Array).set(row as Uint8Array, i * inner);
  });
  return new ort.Tensor(type, rows, dims.with(0, indices.length));
}

const ARRAYS: Readonly<Record<string, { new (length: number): TensorData }>> = {
  int64: BigInt64Array,
  int32: Int32Array,
  float32: Float32Array,
  uint8: Uint8Array,
  bool: Uint8Array,
};

/**
 * Join the tensors that several feeds have for an input, along its first axis; without feeds, or
 * without rows in them, the tensor is empty.
 *
 * Throws BundleError where a feed lacks the input, or has it in another type or shape.
 */
export function joinedTensors(
  ort: Ort,
  input: Session['inputMetadata'][number],
  feeds: readonly Readonly<Record<string, Tensor>>[],
): Tensor {
  const parts = feeds.map(feed => feed[input.name]);
  const [type, shape] = input.isTensor ? [input.type, input.shape] : ['none', []];
  const inner = shape.slice(1).map((size, i) => {
    return typeof size === 'number' ? size : (parts[0]?.dims[i + 1] ?? 0);
  });
  const fits = (part: Tensor | undefined): part is Tensor =>
    part?.type === type &&
    part.dims.length === shape.length &&
    inner.every((size, i) => size === part.dims[i + 1]);
  const Numbers = ARRAYS[type];
  if (Numbers === undefined || !shape.length || !parts.every(fits)) {
    const message = `input '${input.name}' ${type}[${shape}] is not an output of the image processor`;
    throw new VlmportError('BundleError', 'bundle.wrong-graph', message, 'export the bundle again');
  }
  const count = parts.reduce((sum, part) => sum + (part.dims[0] ?? 0), 0);
  const data = new Numbers(inner.reduce((a, b) => a * b, count));
  let at = 0;
  for (const part of parts) {
    (data as Uint8Array).set(part.data as Uint8Array, at);
    at += (part.data as Uint8Array).length;
  }
  return new ort.Tensor(type as TensorType, data, [count, ...inner]);
}

/** Convert a number or a boolean to a tensor without axes. */
export function scalar(ort: Ort, type: TensorType, value: boolean | number): Tensor {
  if (type === 'int64') return new ort.Tensor(type, BigInt64Array.of(BigInt(value)), []);
  if (type === 'bool') return new ort.Tensor(type, [Boolean(value)], []);
  return new ort.Tensor(type as 'float32', [Number(value)], []);
}
