/**
 * A cache of image features by content, so that an image is encoded once (the twin of
 * vlmport/runtime/images/features.py).
 */

import type { ImageOptions } from '../../bundle/manifest.js';
import { sha256 } from '../../bundle/sha256.js';
import type { SentImage } from '../../protocol.js';
import type { Components } from '../graphs/components.js';
import type { Feeds } from '../graphs/sessions.js';
import { type Rgb, openImage } from './reading.js';
import type { Rows } from '../graphs/rows.js';

export const MAX_BYTES = 64 * 1024 * 1024;

/** A processed image, whose tokens in the prompt are known. No part of it is on a GPU. */
export interface PromptImage {
  /** The content hash of its pixels, their shape and the options. */
  readonly key: string;
  readonly promptIds: readonly number[];
  /** The image processor's outputs; once the image is encoded, only those that the positions are
   * computed from. */
  readonly inputs: Feeds;
  /** Null until the image is encoded. */
  readonly features: Rows | null;
}

export type EncodedImage = PromptImage & { readonly features: Rows };

/** The most recently used images, up to `maxBytes` of features; 0 keeps none. */
export class FeatureCache {
  private readonly images = new Map<string, EncodedImage>(); // the oldest first
  private bytes = 0;

  constructor(private readonly maxBytes = MAX_BYTES) {}

  /**
   * Read an image and run the image processor, unless the image is in the cache.
   *
   * The image's prompt ids are known afterwards, so a prompt that is too long can be refused before
   * the vision encoder runs.
   *
   * Throws ImageError or OptionError, or the abort.
   */
  async process(
    components: Components,
    source: SentImage,
    options: ImageOptions,
    signal: AbortSignal,
  ): Promise<PromptImage> {
    if (source.kind === 'values') {
      const { dims, data } = source;
      const key = await contentKey(['values', dims], data);
      const known = this.images.get(key);
      return known ?? { key, ...(await components.processValues(dims, data)), features: null };
    }
    const rgb: Rgb = await openImage(source, signal);
    const merged = { ...components.manifest.image_options, ...options };
    const key = await contentKey([rgb.height, rgb.width, Object.entries(merged).sort()], rgb.data);
    signal.throwIfAborted();
    const known = this.images.get(key);
    if (known) return known;
    return { key, ...(await components.processImage(rgb, options)), features: null };
  }

  /** Return the image with its features and without its pixels, from the cache or from the vision
   * encoder. An image that is encoded already keeps its features. */
  async encoded(
    components: Components,
    image: PromptImage,
    signal: AbortSignal,
  ): Promise<EncodedImage> {
    const known = image.features ? image : (this.images.get(image.key) ?? image);
    const encoded = isEncoded(known)
      ? known
      : {
          ...known,
          features: await components.encodeImage(known.inputs, signal),
          inputs: components.positionInputs(known.inputs),
        };
    this.add(encoded);
    return encoded;
  }

  /** Remove all images. */
  clear(): void {
    this.images.clear();
    this.bytes = 0;
  }

  private add(image: EncodedImage): void {
    if (sizeOf(image) > this.maxBytes) return;
    if (!this.images.delete(image.key)) this.bytes += sizeOf(image);
    this.images.set(image.key, image); // the newest is the last
    for (const [key, oldest] of this.images) {
      if (this.bytes <= this.maxBytes) break;
      this.images.delete(key);
      this.bytes -= sizeOf(oldest);
    }
  }
}

const isEncoded = (image: PromptImage): image is EncodedImage => image.features !== null;

const sizeOf = ({ features, promptIds }: EncodedImage) =>
  features.data.byteLength + promptIds.length * 8;

/** Compute a key from shape and options, and the SHA-256 of the numbers. */
async function contentKey(
  header: readonly unknown[],
  data: Uint8Array<ArrayBuffer> | Float32Array<ArrayBuffer>,
): Promise<string> {
  const bytes = new Uint8Array(data.buffer, data.byteOffset, data.byteLength);
  return `${JSON.stringify(header)} ${await sha256(bytes)}`;
}
