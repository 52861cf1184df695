/**
 * Read any image as RGB pixels, as Python does (the twin of vlmport/runtime/images/reading.py):
 * upright, with transparency on white, colour profiles ignored, never scaled.
 */

import { isWebPage } from '../../bundle/download.js';
import type { ErrorCode } from '../../error-codes.js';
import { VlmportError, firstLine, quoted } from '../../errors.js';
import type { SentImage } from '../../protocol.js';
import { AS_STORED, type Rgba, readBitmap } from './canvas.js';
import { type Frame, type ImageFile, readFile, undecoded } from './files.js';
import { decodePng16 } from './png16.js';

/** An image whose pixels are read here. */
export type PixelSource = Exclude<SentImage, { kind: 'values' }>;

const MAX_PIXELS = 100_000_000;
const MAX_SIDE = 65_536; // larger sides overflow the image processor's integers
const BY_THE_BROWSER = ['AVIF', 'HEIC']; // the browser turns these itself

export interface Rgb {
  readonly width: number;
  readonly height: number;
  readonly data: Uint8Array<ArrayBuffer>; // [height, width, 3]
}

/** Hints for addresses that can't be fetched, by scheme. */
const HINTS: Readonly<Record<string, string>> = {
  'data:': 'does the policy (CSP) of this page allow data: addresses?',
  'blob:': 'was it revoked, or created by another page?',
  'file:': "a page can't read files by address: give a File",
};

/**
 * Read an image. Throws ImageError for one that is not complete, or larger than MAX_PIXELS pixels
 * or MAX_SIDE a side.
 */
export async function openImage(source: PixelSource, signal: AbortSignal): Promise<Rgb> {
  try {
    switch (source.kind) {
      case 'pixels':
        checkSize(source.width, source.height);
        return fromPixels(source);
      case 'bitmap':
        return await fromBitmap(source.bitmap);
      case 'blob':
        return await fromFile(source.blob);
      case 'url':
        return await fromFile(await fetchBlob(source.url, signal));
    }
  } catch (error) {
    if (!(error instanceof RangeError)) throw error; // it is thrown for an array without memory
    const message = `not enough memory for this image (${firstLine(error)})`;
    const hint = 'scale it down first';
    throw new VlmportError('ImageError', 'image.out-of-memory', message, hint);
  }
}

async function fetchBlob(url: string, signal: AbortSignal): Promise<Blob> {
  try {
    const response = await fetch(url, { signal });
    if (response.ok) return await imageOf(response, url);
    const message = `${url}: the server answered with status ${response.status}`;
    throw new VlmportError('ImageError', 'image.not-fetched', message, 'check the address');
  } catch (error) {
    signal.throwIfAborted();
    if (error instanceof VlmportError) throw error;
    const message = `${url} can't be fetched (${firstLine(error)})`;
    const scheme = /^\w+:/.exec(url)?.[0] ?? '';
    const problem = scheme === 'data:' ? badData(url) : null;
    if (problem) throw problem;
    const hint = HINTS[scheme] ?? 'a server of another origin has to allow this page (CORS)';
    throw new VlmportError('ImageError', 'image.not-fetched', message, hint);
  }
}

/** Return the error of a malformed data: address, or null (the twin of
 * vlmport/runtime/images/uris.py). */
function badData(url: string): VlmportError | null {
  const [, head = '', body] = /^data:([^,]*)(?:,(.*))?$/s.exec(url) ?? [];
  if (body === undefined) {
    const message = `${quoted(url, 40)}: a data: address without the comma before its data`;
    const hint = 'for example data:image/png;base64,iVBORw0…';
    return new VlmportError('ImageError', 'image.bad-data-address', message, hint);
  }
  if (!/;\s*base64\s*$/i.test(head)) return null;
  try {
    atob(decodeURIComponent(body));
    return null;
  } catch {
    const message = `not base64: ${quoted(url, 40)}`;
    const hint = 'check that it is complete; toBase64() of a Uint8Array writes base64';
    return new VlmportError('ImageError', 'image.bad-base64', message, hint);
  }
}

/** Read the body of a response. Some servers send a web page with status 200 for a missing file. */
async function imageOf(response: Response, url: string): Promise<Blob> {
  const blob = await response.blob();
  if (!isWebPage(await blob.slice(0, 1024).text())) return blob;
  const message = `${url} is a web page, not an image`;
  const hint = 'check the address: the server may send a page or a login instead of the image';
  throw new VlmportError('ImageError', 'source.web-page', message, hint);
}

/** Read a file. Its size is checked before anything is decoded. */
async function fromFile(blob: Blob): Promise<Rgb> {
  if (blob.size === 0) {
    const message = 'the image file is empty (0 bytes)';
    throw new VlmportError('ImageError', 'image.empty', message, 'download or copy it again');
  }
  const file = await readFile(new Uint8Array(await blob.arrayBuffer()));
  const { width, height, format, orientation } = file;
  checkSize(width, height);
  if (file.depth === 16) {
    return turned({ width, height, data: onWhite(await decodePng16(file)) }, orientation);
  }
  const bitmap = await decode(file, blob.type);
  if (!BY_THE_BROWSER.includes(format) && (bitmap.width !== width || bitmap.height !== height)) {
    const found = `${bitmap.width}x${bitmap.height}`;
    bitmap.close();
    const message = `the browser decodes an image of ${width}x${height} pixels to ${found}`;
    const hint = 'save it as PNG';
    throw new VlmportError('ImageError', 'image.unreadable', message, hint);
  }
  const rgb = await fromBitmap(bitmap);
  if (file.frame) paintOutside(rgb, file.frame);
  return turned(rgb, orientation);
}

/** Fill the pixels that a frame does not cover with the colour that Pillow uses. */
function paintOutside({ width, height, data }: Rgb, frame: Frame): void {
  if (frame.width >= width && frame.height >= height) return;
  for (let y = 0, at = 0; y < height; y++) {
    for (let x = 0; x < width; x++, at += 3) {
      const [right, down] = [x - frame.x, y - frame.y];
      if (right >= 0 && right < frame.width && down >= 0 && down < frame.height) continue;
      data.set(frame.outside, at);
    }
  }
}

async function decode(file: ImageFile, type: string): Promise<ImageBitmap> {
  try {
    return await createImageBitmap(new Blob([...file.parts], { type }), AS_STORED);
  } catch {
    throw undecoded(file);
  }
}

/** Read a bitmap and close it. */
async function fromBitmap(bitmap: ImageBitmap): Promise<Rgb> {
  const { width, height } = bitmap;
  try {
    checkSize(width, height);
    const data = new Uint8Array(width * height * 3);
    await readBitmap(bitmap, (rgba, x, y, columns, rows) => {
      const rgb = onWhite(rgba);
      for (let row = 0; row < rows; row++) {
        const line = rgb.subarray(row * columns * 3, (row + 1) * columns * 3);
        data.set(line, ((y + row) * width + x) * 3);
      }
    });
    return { width, height, data };
  } finally {
    bitmap.close();
  }
}

/** Turn pixels as an EXIF orientation says. */
export function turned(rgb: Rgb, orientation: number): Rgb {
  if (orientation === 1) return rgb;
  const { width, height, data } = rgb;
  const [swapped, flipX, flipY] = [
    orientation >= 5,
    [2, 3, 6, 7].includes(orientation),
    [3, 4, 7, 8].includes(orientation),
  ];
  const [columns, rows] = swapped ? [height, width] : [width, height];
  const result = new Uint8Array(data.length);
  for (let y = 0, to = 0; y < rows; y++) {
    for (let x = 0; x < columns; x++, to += 3) {
      const [right, down] = [flipX ? columns - 1 - x : x, flipY ? rows - 1 - y : y];
      const from = 3 * (swapped ? right * width + down : down * width + right);
      result[to] = data[from]!;
      result[to + 1] = data[from + 1]!;
      result[to + 2] = data[from + 2]!;
    }
  }
  return { width: columns, height: rows, data: result };
}

function fromPixels({ width, height, channels, data }: PixelSource & { kind: 'pixels' }): Rgb {
  if (data.length !== width * height * channels) {
    const message = `${data.length} bytes for ${width}x${height} pixels of ${channels} channels`;
    const hint = 'the shape is [height, width, channels]; give one image at a time';
    throw new VlmportError('ImageError', 'image.wrong-array', message, hint);
  }
  if (channels === 4) return { width, height, data: onWhite(data) };
  if (channels === 3) return { width, height, data: Uint8Array.from(data) };
  const rgb = new Uint8Array(width * height * 3);
  for (let i = 0; i < data.length; i++) rgb.fill(data[i]!, i * 3, i * 3 + 3);
  return { width, height, data: rgb };
}

function checkSize(width: number, height: number): void {
  const number = (value: number) => value.toLocaleString('en-US');
  const size = `${width}x${height}`;
  const refuse = (message: string, hint: string, code: ErrorCode = 'image.too-large') => {
    throw new VlmportError('ImageError', code, message, hint);
  };
  if (!(width >= 1 && height >= 1)) {
    refuse(`${size} pixels`, 'give an image with at least one pixel', 'image.empty');
  }
  if (width * height > MAX_PIXELS) {
    const message = `${size} is ${number(width * height)} pixels, the maximum is ${number(MAX_PIXELS)}`;
    refuse(message, 'scale it down first');
  }
  if (Math.max(width, height) > MAX_SIDE) {
    const message = `${size} pixels, the maximum of a side is ${number(MAX_SIDE)}`;
    refuse(message, 'cut it into pieces, or scale it down first');
  }
}

/**
 * Blend RGBA with white.
 *
 * Source: Pillow 13, AlphaComposite.c, with an opaque white background.
 */
export function onWhite(rgba: Rgba): Uint8Array<ArrayBuffer> {
  const rgb = new Uint8Array((rgba.length / 4) * 3);
  for (let from = 0, to = 0; from < rgba.length; from += 4, to += 3) {
    const alpha = rgba[from + 3]!;
    if (alpha === 255) {
      rgb[to] = rgba[from]!;
      rgb[to + 1] = rgba[from + 1]!;
      rgb[to + 2] = rgba[from + 2]!;
    } else {
      const white = 255 * (255 - alpha) * 128 + (128 << 7);
      for (let c = 0; c < 3; c++) {
        const blend = rgba[from + c]! * alpha * 128 + white;
        rgb[to + c] = ((blend >>> 8) + blend) >>> 15;
      }
    }
  }
  return rgb;
}
