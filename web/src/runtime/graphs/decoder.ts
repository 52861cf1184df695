/**
 * The decoder's inputs and outputs: its pairs of cache tensors and their sizes (the twin of
 * vlmport/runtime/graphs/decoder.py).
 */

import type { Manifest } from '../../bundle/manifest.js';
import { VlmportError } from '../../errors.js';
import type { Session, TensorType } from './sessions.js';

/** One cache tensor: its input, its output, and its fixed sizes. */
export interface CachePort {
  readonly past: string;
  readonly present: string;
  readonly heads: number;
  readonly headDim: number;
  readonly type: TensorType;
}

/** The decoder's session with its inputs and outputs. */
export interface Decoder {
  readonly session: Session;
  readonly ports: readonly CachePort[];
  readonly inputs: ReadonlySet<string>;
  readonly positionsRank: number; // 2: [B, S]; 3: [3, B, S]
  /** Whether rows are run one by one, because a row's logits would depend on the other rows. */
  readonly rowByRow: boolean;
}

/** Pair cache inputs and outputs by name. Throws BundleError where one has no match. */
export function decoderOf(
  session: Session,
  cache: Manifest['cache'],
  where: string,
  rowByRow: boolean,
): Decoder {
  const again = 'export the bundle again';
  const { past, present } = cache;
  const outputs = new Set(session.outputNames);
  const ports = session.inputMetadata.flatMap((input): CachePort[] => {
    if (!input.name.startsWith(past)) return [];
    const partner = present + input.name.slice(past.length);
    const [heads, headDim] = input.isTensor ? [input.shape[1], input.shape[3]] : [];
    if (!outputs.has(partner) || !input.isTensor || !isSize(heads) || !isSize(headDim)) {
      const message = `${where}: ${input.name} has no matching output, or no fixed sizes`;
      throw new VlmportError('BundleError', 'bundle.wrong-graph', message, again);
    }
    return [{ past: input.name, present: partner, heads, headDim, type: input.type }];
  });
  const inputs = new Set(session.inputNames);
  if (!ports.length || !outputs.has('logits') || !inputs.has('inputs_embeds')) {
    throw new VlmportError(
      'BundleError',
      'bundle.wrong-graph',
      `${where}: no cache, logits or inputs_embeds`,
      again,
    );
  }
  const positions = session.inputMetadata.find(one => one.name === 'position_ids');
  return {
    session,
    ports,
    inputs,
    positionsRank: positions?.isTensor ? positions.shape.length : 2,
    rowByRow,
  };
}

const SCALED = new TextEncoder().encode('DynamicQuantizeLinear');

/**
 * Whether a graph rounds activations by one scale for all rows of a call (8-bit ones do). The
 * operator's name is searched in the graph's bytes.
 */
export function scalesByCall(model: Uint8Array): boolean {
  const isHere = (at: number) => SCALED.every((byte, i) => model[at + i] === byte);
  for (let at = model.indexOf(SCALED[0]!); at >= 0; at = model.indexOf(SCALED[0]!, at + 1)) {
    if (isHere(at)) return true;
  }
  return false;
}

const isSize = (size: unknown): size is number => typeof size === 'number' && size > 0;
