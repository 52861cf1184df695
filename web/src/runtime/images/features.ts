/**
 * Image features by content, so that a picture that was seen is not encoded again (the twin of
 * vlmport/runtime/images/features.py).
 */

import type { ImageOptions } from '../../bundle/manifest.js';
import { sha256 } from '../../bundle/sha256.js';
import type { Picture as Source } from '../../protocol.js';
import type { Components } from '../graphs/components.js';
import type { Feeds } from '../graphs/sessions.js';
import { type Rgb, openImage } from './reading.js';
import type { Rows } from '../graphs/rows.js';

export const MAX_BYTES = 64 * 1024 * 1024;

/** A picture whose place in the prompt is known. Nothing of it lies on a GPU. */
export interface Picture {
  /** Equal for equal pixels of equal shape, under the same options. */
  readonly key: string;
  readonly promptIds: readonly number[];
  /** What the image processor gave; with features, only what positions are computed from. */
  readonly inputs: Feeds;
  readonly features: Rows | null;
}

export type EncodedPicture = Picture & { readonly features: Rows };

/** The most recently used pictures, up to `maxBytes` of features. */
export class FeatureCache {
  private readonly kept = new Map<string, EncodedPicture>(); // the oldest first
  private bytes = 0;

  constructor(private readonly maxBytes = MAX_BYTES) {}

  /**
   * Read a picture and run the image processor, unless it is known. Its prompt ids are then known,
   * so that a prompt can be refused before the vision encoder has cost anything.
   *
   * Throws ImageError or OptionError, or the abort.
   */
  async process(
    components: Components,
    source: Source,
    options: ImageOptions,
    signal: AbortSignal,
  ): Promise<Picture> {
    if (source.kind === 'values') {
      const { dims, data } = source;
      const key = await contentKey(['values', dims], data);
      const known = this.kept.get(key);
      return known ?? { key, ...(await components.processValues(dims, data)), features: null };
    }
    const rgb: Rgb = await openImage(source, signal);
    const told = { ...components.manifest.image_options, ...options };
    const key = await contentKey([rgb.height, rgb.width, Object.entries(told).sort()], rgb.data);
    signal.throwIfAborted();
    const known = this.kept.get(key);
    if (known) return known;
    return { key, ...(await components.processImage(rgb, options)), features: null };
  }

  /** The picture with its features and without its pixels, from here or from the vision encoder. */
  async encoded(
    components: Components,
    picture: Picture,
    signal: AbortSignal,
  ): Promise<EncodedPicture> {
    const known = picture.features ? picture : (this.kept.get(picture.key) ?? picture);
    const encoded = isEncoded(known)
      ? known
      : {
          ...known,
          features: await components.encodeImage(known.inputs, signal),
          inputs: components.positionInputs(known.inputs),
        };
    this.keep(encoded);
    return encoded;
  }

  clear(): void {
    this.kept.clear();
    this.bytes = 0;
  }

  private keep(picture: EncodedPicture): void {
    if (sizeOf(picture) > this.maxBytes) return;
    if (!this.kept.delete(picture.key)) this.bytes += sizeOf(picture);
    this.kept.set(picture.key, picture); // the newest is the last
    for (const [key, oldest] of this.kept) {
      if (this.bytes <= this.maxBytes) break;
      this.kept.delete(key);
      this.bytes -= sizeOf(oldest);
    }
  }
}

const isEncoded = (picture: Picture): picture is EncodedPicture => picture.features !== null;

const sizeOf = ({ features, promptIds }: EncodedPicture) =>
  features.data.byteLength + promptIds.length * 8;

/** SHA-256 of what is told and of the numbers. */
async function contentKey(
  told: readonly unknown[],
  data: Uint8Array<ArrayBuffer> | Float32Array<ArrayBuffer>,
): Promise<string> {
  const bytes = new Uint8Array(data.buffer, data.byteOffset, data.byteLength);
  return `${JSON.stringify(told)} ${await sha256(bytes)}`;
}
