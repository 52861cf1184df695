/**
 * The positions of a prompt's tokens, as the bundle's own graph computes them (the twin of
 * vlmport/runtime/graphs/positions.py).
 *
 * The graph gets what its own inputs ask for: the ids, their mask, and whatever else the image
 * processor made for each image under the same name. Nothing here knows what that is.
 */

import { VlmportError } from '../../errors.js';
import { refusal } from './refusals.js';
import { integers } from './rows.js';
import type { Feeds, Ort, Session } from './sessions.js';
import { joinedTensors } from './slices.js';

export const POSITIONS = 'position_ids';

/** The positions of a prompt's tokens. */
export interface Positions {
  /** One row of S positions, or three (time, height and width). */
  readonly ids: readonly BigInt64Array[];
  /** The next position after the prompt, minus the number of its tokens. */
  readonly ropeDelta: number;
}

/** 0, 1, …: for a bundle without a graph of positions. */
export function counted(ids: readonly number[]): Positions {
  return { ids: [BigInt64Array.from(ids, (_, i) => BigInt(i))], ropeDelta: 0 };
}

/**
 * Run the graph on a prompt's ids and on what the image processor gave for each of its images.
 *
 * Throws BundleError where the image processor does not make what the graph asks for, PromptError
 * where the graph refuses the images.
 */
export async function computed(
  ort: Ort,
  session: Session,
  ids: readonly number[],
  images: readonly Feeds[],
): Promise<Positions> {
  const shape = [1, ids.length];
  const own: Feeds = {
    input_ids: new ort.Tensor('int64', BigInt64Array.from(ids, BigInt), shape),
    attention_mask: new ort.Tensor('int64', new BigInt64Array(ids.length).fill(1n), shape),
  };
  const feeds = Object.fromEntries(
    session.inputMetadata.map(input => [
      input.name,
      own[input.name] ?? joinedTensors(ort, input, images),
    ]),
  );
  const { position_ids, rope_delta } = await session.run(feeds).catch((error: unknown) => {
    const [reason, hint] = refusal(error, 'check that all files are of one bundle');
    const message = `no positions for ${images.length} images: ${reason}`;
    throw new VlmportError('PromptError', 'prompt.refused', message, hint);
  });
  const all = integers(position_ids, `${POSITIONS}: position_ids`);
  const [ropeDelta] = integers(rope_delta, `${POSITIONS}: rope_delta`);
  const axes = Array.from({ length: all.length / ids.length }, (_, axis) =>
    all.slice(axis * ids.length, (axis + 1) * ids.length),
  );
  return { ids: axes, ropeDelta: Number(ropeDelta) };
}
