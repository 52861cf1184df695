/**
 * The image processor's graph: an image and options in, the vision encoder's inputs out (the twin
 * of vlmport/runtime/graphs/image_processor.py).
 */

import type { ImageOptions } from '../../bundle/manifest.js';
import { VlmportError, cut, didYouMean, quoted } from '../../errors.js';
import type { Rgb } from '../images/reading.js';
import { refusal } from './refusals.js';
import { integers } from './rows.js';
import type { Feeds, Ort, Session, TensorType } from './sessions.js';
import { scalar } from './slices.js';

export const IMAGE = 'image_processor';

/** One image as the image processor gives it. */
export interface ProcessedImage {
  /** The vision encoder's inputs by name. */
  readonly inputs: Feeds;
  /** The token ids that stand for the image in a prompt. */
  readonly promptIds: number[];
}

/** Run an image processor on one image. Throws as the method of Components. */
export async function processImage(
  ort: Ort,
  session: Session,
  { width, height, data }: Rgb,
  options: ImageOptions,
): Promise<ProcessedImage> {
  const image = new ort.Tensor('uint8', data, [height, width, 3]);
  const feeds = { image, ...optionFeeds(ort, session, options) };
  const outputs = await session.run(feeds).catch((error: unknown) => {
    const [reason, hint] = refusal(error, 'is it extremely narrow?');
    const message = `an image of ${width}x${height} pixels can't be processed: ${reason}`;
    throw new VlmportError('ImageError', 'image.refused', message, hint);
  });
  Object.values(feeds).forEach(tensor => tensor.dispose());
  const { prompt_ids, ...inputs } = outputs;
  const promptIds = Array.from(integers(prompt_ids, `${IMAGE}: prompt_ids`), Number);
  prompt_ids?.dispose();
  return { inputs, promptIds };
}

/**
 * Options as tensors of the types that the graph takes.
 *
 * Throws OptionError for an option that the graph does not have, or of another type.
 */
export function optionFeeds(ort: Ort, session: Session, options: ImageOptions): Feeds {
  const known = session.inputMetadata.filter(one => one.name !== 'image');
  const names = known.map(one => one.name);
  return Object.fromEntries(
    Object.entries(options).map(([name, value]) => {
      const input = known.find(one => one.name === name);
      if (!input?.isTensor) {
        const message = `this bundle has no image option '${cut(name)}'${didYouMean(name, names)}`;
        const hint = `its image options: ${names.join(', ') || 'none'}`;
        throw new VlmportError('OptionError', 'option.unknown', message, hint);
      }
      if (!fitsType(value, input.type)) {
        const message = `image option ${name}=${quoted(value)}: expected ${input.type}`;
        const hint = 'true, false, 5 or 0.5';
        throw new VlmportError('OptionError', 'option.wrong-value', message, hint);
      }
      return [name, scalar(ort, input.type, value)];
    }),
  );
}

/** Whether a value is one of a tensor's type: a number is no boolean, and 0.5 is no integer. */
function fitsType(value: unknown, type: TensorType): boolean {
  if (type === 'bool') return typeof value === 'boolean';
  return typeof value === 'number' && (type.startsWith('float') || Number.isInteger(value));
}
