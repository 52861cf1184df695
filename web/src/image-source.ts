/** The images that a page can give, and how each is sent to the worker. */

import { wholeAddress } from './address.js';
import { VlmportError, cut, firstLine } from './errors.js';
import type { NumberedImage, SentImage } from './protocol.js';

/** The image class of transformers.js: channels come last. */
export interface RawImage {
  readonly data: Uint8Array | Uint8ClampedArray;
  readonly width: number;
  readonly height: number;
  readonly channels: number;
}

/** The output of a processor of transformers.js for one image: float32 [1, 3, height, width]. */
export interface PixelValues {
  readonly dims: readonly number[];
  readonly data: Float32Array;
}

export type ImageSource =
  | Blob // a File is one
  | string
  | URL
  | HTMLImageElement
  | HTMLCanvasElement
  | OffscreenCanvas
  | ImageData
  | ImageBitmap
  | RawImage
  | PixelValues;

/**
 * Convert an image for the worker; the source is not changed. Throws ImageError for other types.
 */
export async function toSentImage(source: ImageSource): Promise<SentImage> {
  if (source instanceof Blob) return { kind: 'blob', blob: source };
  if (typeof source === 'string' || source instanceof URL) return fromUrl(source);
  if (isA('HTMLImageElement', source)) return fromElement(source as HTMLImageElement);
  if (
    isA('HTMLCanvasElement', source) ||
    isA('OffscreenCanvas', source) ||
    isA('ImageBitmap', source)
  ) {
    return fromBitmap(source as HTMLCanvasElement | OffscreenCanvas | ImageBitmap);
  }
  if (isA('ImageData', source)) {
    const { width, height, data } = source as ImageData;
    return { kind: 'pixels', width, height, channels: 4, data: Uint8Array.from(data) };
  }
  if (isRawImage(source)) return fromRawImage(source);
  if (isPixelValues(source)) {
    return { kind: 'values', dims: [...source.dims], data: Float32Array.from(source.data) };
  }
  const message = `unsupported image type: ${describe(source)}`;
  const hint = 'use a File, Blob, URL, <img>, canvas, ImageData, ImageBitmap or RawImage';
  throw new VlmportError('ImageError', 'image.wrong-type', message, hint);
}

/** List the parts of an image that are moved to the worker, not copied. */
export function transferOf({ image }: NumberedImage): Transferable[] {
  if (image?.kind === 'bitmap') return [image.bitmap];
  return image?.kind === 'pixels' || image?.kind === 'values' ? [image.data.buffer] : [];
}

function fromUrl(source: string | URL): SentImage {
  try {
    return { kind: 'url', url: wholeAddress(source).href };
  } catch {
    const message = `'${cut(String(source))}' is not a URL`;
    const hint = "for example './photo.jpg'";
    throw new VlmportError('ImageError', 'image.not-fetched', message, hint);
  }
}

/** Fetch the file of an <img> where that is allowed, for its own pixels; else read the element. */
async function fromElement(image: HTMLImageElement): Promise<SentImage> {
  try {
    await image.decode();
  } catch (error) {
    const message = `the <img> has no readable image (${firstLine(error)})`;
    const hint = `is ${image.currentSrc || 'its src'} an image?`;
    throw new VlmportError('ImageError', 'image.unreadable', message, hint);
  }
  try {
    const response = await fetch(image.currentSrc);
    if (response.ok) return { kind: 'blob', blob: await response.blob() };
  } catch {
    // The pixels of the element may still be readable.
  }
  return fromBitmap(image);
}

async function fromBitmap(
  source: HTMLImageElement | HTMLCanvasElement | OffscreenCanvas | ImageBitmap,
): Promise<SentImage> {
  try {
    const bitmap = await createImageBitmap(source, {
      colorSpaceConversion: 'none',
      premultiplyAlpha: 'none',
    });
    return { kind: 'bitmap', bitmap };
  } catch (error) {
    const message = `the image can't be read (${firstLine(error)})`;
    const hint = 'is it empty, or from another origin?';
    throw new VlmportError('ImageError', 'image.unreadable', message, hint);
  }
}

function fromRawImage({ width, height, channels, data }: RawImage): SentImage {
  if (channels !== 1 && channels !== 3 && channels !== 4) {
    const message = `a RawImage has ${channels} channels, expected 1, 3 or 4`;
    const hint = 'RawImage.rgb() converts it to 3';
    throw new VlmportError('ImageError', 'image.wrong-array', message, hint);
  }
  return { kind: 'pixels', width, height, channels, data: Uint8Array.from(data) };
}

/** Whether a value is of a class that may not exist here. */
function isA(name: string, value: object): boolean {
  const kind: unknown = Reflect.get(globalThis, name);
  return typeof kind === 'function' && value instanceof kind;
}

function isRawImage(source: unknown): source is RawImage {
  if (typeof source !== 'object' || source === null) return false;
  const { data, width, height, channels } = source as Partial<RawImage>;
  const bytes = data instanceof Uint8Array || data instanceof Uint8ClampedArray;
  return bytes && [width, height, channels].every(value => typeof value === 'number');
}

function isPixelValues(source: unknown): source is PixelValues {
  if (typeof source !== 'object' || source === null) return false;
  const { data, dims } = source as Partial<PixelValues>;
  return data instanceof Float32Array && Array.isArray(dims);
}

const describe = (value: unknown) =>
  typeof value === 'object' && value !== null
    ? (value.constructor?.name ?? 'an object')
    : String(value);
