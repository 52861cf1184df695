/** Whatever a page has of a picture, made ready for the worker. */

import { wholeAddress } from './address.js';
import { VlmportError, cut, firstLine } from './errors.js';
import type { Picture } from './protocol.js';

/** The image class of transformers.js: channels come last. */
export interface RawImage {
  readonly data: Uint8Array | Uint8ClampedArray;
  readonly width: number;
  readonly height: number;
  readonly channels: number;
}

/** What a processor of transformers.js makes of a picture, float32 [1, 3, height, width]. */
export interface PixelValues {
  readonly dims: readonly number[];
  readonly data: Float32Array;
}

export type PictureSource =
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

/** Throws ImageError for what is no picture. The source itself is left as it is. */
export async function toPicture(source: PictureSource): Promise<Picture> {
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
  const message = `a picture can't be ${describe(source)}`;
  const hint = 'a File, Blob, URL, <img>, canvas, ImageData, ImageBitmap or RawImage';
  throw new VlmportError('ImageError', 'image.wrong-type', message, hint);
}

/** What of a picture moves to the worker instead of being copied. */
export function transferOf(picture: Picture): Transferable[] {
  if (picture.kind === 'bitmap') return [picture.bitmap];
  return picture.kind === 'pixels' || picture.kind === 'values' ? [picture.data.buffer] : [];
}

function fromUrl(source: string | URL): Picture {
  try {
    return { kind: 'url', url: wholeAddress(source).href };
  } catch {
    const message = `'${cut(String(source))}' is not a URL`;
    const hint = "for example './photo.jpg'";
    throw new VlmportError('ImageError', 'image.not-fetched', message, hint);
  }
}

/** From its address where that can be read, for the pixels of the file itself. */
async function fromElement(image: HTMLImageElement): Promise<Picture> {
  try {
    await image.decode();
  } catch (error) {
    const message = `the <img> shows no picture (${firstLine(error)})`;
    const hint = `is ${image.currentSrc || 'its src'} a picture?`;
    throw new VlmportError('ImageError', 'image.unreadable', message, hint);
  }
  try {
    const response = await fetch(image.currentSrc);
    if (response.ok) return { kind: 'blob', blob: await response.blob() };
  } catch {
    // Its pixels may be readable all the same.
  }
  return fromBitmap(image);
}

async function fromBitmap(
  source: HTMLImageElement | HTMLCanvasElement | OffscreenCanvas | ImageBitmap,
): Promise<Picture> {
  try {
    const bitmap = await createImageBitmap(source, {
      colorSpaceConversion: 'none',
      premultiplyAlpha: 'none',
    });
    return { kind: 'bitmap', bitmap };
  } catch (error) {
    const message = `the picture can't be read (${firstLine(error)})`;
    const hint = 'is it empty, or from another origin?';
    throw new VlmportError('ImageError', 'image.unreadable', message, hint);
  }
}

function fromRawImage({ width, height, channels, data }: RawImage): Picture {
  if (channels !== 1 && channels !== 3 && channels !== 4) {
    const message = `a RawImage of ${channels} channels`;
    const hint = 'RawImage.rgb() makes it 3';
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
