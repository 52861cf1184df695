/** Embeddings and features as rows of float32. */

import { VlmportError } from '../../errors.js';
import type { Tensor, TensorData } from './sessions.js';

/** Rows of numbers, one after the other. */
export interface Rows {
  readonly count: number;
  readonly width: number;
  readonly data: Float32Array;
}

/** Read a float tensor [..., D] as rows, and dispose it. */
export async function rowsOf(tensor: Tensor | undefined): Promise<Rows> {
  if (tensor === undefined) {
    throw new VlmportError(
      'BundleError',
      'bundle.wrong-graph',
      'a graph has no such output',
      'export the bundle again',
    );
  }
  const width = tensor.dims.at(-1) ?? 1;
  try {
    const data = asFloat32(await tensor.getData());
    return { count: data.length / width, width, data };
  } finally {
    tensor.dispose();
  }
}

/** The numbers of an int64 output. Throws BundleError where `where` gives none. */
export function integers(tensor: Tensor | undefined, where: string): BigInt64Array {
  const data = tensor?.data;
  if (data instanceof BigInt64Array) return data;
  const message = `${where}: the graph gives no int64 output of this name`;
  throw new VlmportError('BundleError', 'bundle.wrong-graph', message, 'export the bundle again');
}

/** Join rows in order. All have the width of the first. */
export function joined(parts: readonly Rows[]): Rows {
  const [first] = parts;
  if (first && parts.length === 1) return first;
  const width = first?.width ?? 1;
  const data = new Float32Array(parts.reduce((sum, one) => sum + one.data.length, 0));
  let at = 0;
  for (const one of parts) {
    data.set(one.data, at);
    at += one.data.length;
  }
  return { count: data.length / width, width, data };
}

/** Convert to float32. 16-bit floats are a Float16Array, or their bits in browsers without that. */
function asFloat32(data: TensorData): Float32Array {
  if (data instanceof Float32Array) return data;
  if (data instanceof Uint16Array) return Float32Array.from(data, halfToNumber);
  return Float32Array.from(data as unknown as Iterable<number>);
}

export function halfToNumber(bits: number): number {
  const sign = bits & 0x8000 ? -1 : 1;
  const exponent = (bits >> 10) & 31;
  const fraction = bits & 1023;
  if (exponent === 31) return fraction ? NaN : sign * Infinity;
  if (exponent === 0) return sign * fraction * 2 ** -24;
  return sign * (1 + fraction / 1024) * 2 ** (exponent - 15);
}

/**
 * Return a copy of embeddings, with features in order over the rows where the id is the image
 * token. The first `past` rows of the features are skipped.
 *
 * Throws PromptError unless there are exactly as many rows as such ids.
 */
export function mergeImageFeatures(
  embeds: Rows,
  ids: readonly number[],
  features: readonly Rows[],
  imageTokenId: number,
  past = 0,
): Float32Array {
  const places = ids.flatMap((id, row) => (id === imageTokenId ? [row] : []));
  const rows = features
    .flatMap(({ count, width, data }) =>
      Array.from({ length: count }, (_, i) => data.subarray(i * width, (i + 1) * width)),
    )
    .slice(past);
  if (places.length !== rows.length) {
    const message = `${places.length} image tokens in the prompt, but ${rows.length} features`;
    const hint =
      'check that each image has its placeholder, and that no image token is written by hand';
    throw new VlmportError('PromptError', 'prompt.wrong-features', message, hint);
  }
  const merged = Float32Array.from(embeds.data);
  rows.forEach((row, i) => {
    if (row.length !== embeds.width) {
      const message = `features have width ${row.length}, embeddings ${embeds.width}`;
      throw new VlmportError(
        'PromptError',
        'prompt.wrong-features',
        message,
        'check that all files are of one bundle',
      );
    }
    merged.set(row, places[i]! * embeds.width);
  });
  return merged;
}
