/**
 * Any picture as RGB pixels, as vlmport/runtime/images.py reads it: upright, transparency over
 * white, colour profiles ignored, never scaled.
 *
 * A 2D canvas holds colours multiplied by their alpha, which loses bits of half transparent pixels.
 * Those pictures are read back through WebGL, which does not multiply.
 */

import { VlmportError, firstLine } from '../errors.js';
import type { Picture as AnyPicture } from '../protocol.js';

/** A picture whose pixels are to be read. */
export type Picture = Exclude<AnyPicture, { kind: 'values' }>;

const MAX_PIXELS = 100_000_000;
const MAX_SIDE = 65_536; // up to here the image processor's integers hold
const FORMATS = 'PNG, JPEG, WebP, GIF, BMP and AVIF are read';

export interface Rgb {
  readonly width: number;
  readonly height: number;
  readonly data: Uint8Array<ArrayBuffer>; // [height, width, 3]
}

/** What helps where an address of this scheme can't be fetched. */
const HINTS: Readonly<Record<string, string>> = {
  'data:': 'is it whole, and is what follows ;base64, base64?',
  'blob:': 'was it revoked, or made by another page?',
  'file:': 'pages read no files by their address: give a File',
};

type Rgba = Uint8ClampedArray<ArrayBuffer> | Uint8Array<ArrayBuffer>;

/** How a bitmap is decoded so that its numbers are those of the file. */
export const AS_STORED: ImageBitmapOptions = {
  colorSpaceConversion: 'none',
  premultiplyAlpha: 'none',
  imageOrientation: 'from-image',
};

/** Throws ImageError for whatever is no whole picture, for more than MAX_PIXELS pixels and a longer side than MAX_SIDE. */
export async function openImage(picture: Picture, signal: AbortSignal): Promise<Rgb> {
  switch (picture.kind) {
    case 'pixels':
      checkSize(picture.width, picture.height);
      return fromPixels(picture);
    case 'bitmap':
      return fromBitmap(picture.bitmap);
    case 'blob':
      return fromBitmap(await decode(picture.blob));
    case 'url':
      return fromBitmap(await decode(await fetchBlob(picture.url, signal)));
  }
}

async function fetchBlob(url: string, signal: AbortSignal): Promise<Blob> {
  try {
    const response = await fetch(url, { signal });
    if (response.ok) return await response.blob();
    throw new VlmportError(
      'ImageError',
      `${url}: the server says ${response.status}`,
      'is it there?',
    );
  } catch (error) {
    signal.throwIfAborted();
    if (error instanceof VlmportError) throw error;
    const message = `${url} can't be fetched (${firstLine(error)})`;
    const scheme = /^\w+:/.exec(url)?.[0] ?? '';
    const hint = HINTS[scheme] ?? 'on another origin the server has to allow this page (CORS)';
    throw new VlmportError('ImageError', message, hint, { code: 'image.not-fetched' });
  }
}

async function decode(blob: Blob): Promise<ImageBitmap> {
  if (blob.size === 0) {
    throw new VlmportError('ImageError', 'the picture is empty (0 bytes)', 'choose it again');
  }
  try {
    return await createImageBitmap(blob, AS_STORED);
  } catch (error) {
    const message = `not a picture that this browser can read (${firstLine(error)})`;
    throw new VlmportError('ImageError', message, FORMATS);
  }
}

/** Reads a bitmap and closes it. */
function fromBitmap(bitmap: ImageBitmap): Rgb {
  const { width, height } = bitmap;
  try {
    checkSize(width, height);
    const drawn = readByCanvas(bitmap);
    const halfTransparent = hasPartialAlpha(drawn);
    const rgba = halfTransparent ? (readByWebGl(bitmap) ?? drawn) : drawn;
    return { width, height, data: onWhite(rgba) };
  } finally {
    bitmap.close();
  }
}

function readByCanvas(bitmap: ImageBitmap): Rgba {
  const canvas = new OffscreenCanvas(bitmap.width, bitmap.height);
  const context = canvas.getContext('2d', { willReadFrequently: true });
  try {
    if (context === null) throw new Error('no 2D canvas of this size');
    context.drawImage(bitmap, 0, 0);
    return context.getImageData(0, 0, bitmap.width, bitmap.height).data;
  } catch (error) {
    const tainted = error instanceof DOMException && error.name === 'SecurityError';
    const message = `the pixels can't be read (${firstLine(error)})`;
    const hint = tainted
      ? "the picture is from another origin: load it with crossorigin='anonymous'"
      : 'scale it down first';
    throw new VlmportError('ImageError', message, hint);
  }
}

/** The pixels as they are in the file; null where WebGL is missing or too small. */
function readByWebGl(bitmap: ImageBitmap): Rgba | null {
  const { width, height } = bitmap;
  const gl = new OffscreenCanvas(1, 1).getContext('webgl');
  if (gl === null || Math.max(width, height) > Number(gl.getParameter(gl.MAX_TEXTURE_SIZE))) {
    return null;
  }
  gl.pixelStorei(gl.UNPACK_PREMULTIPLY_ALPHA_WEBGL, false);
  gl.pixelStorei(gl.UNPACK_COLORSPACE_CONVERSION_WEBGL, gl.NONE);
  gl.bindTexture(gl.TEXTURE_2D, gl.createTexture());
  gl.texImage2D(gl.TEXTURE_2D, 0, gl.RGBA, gl.RGBA, gl.UNSIGNED_BYTE, bitmap);
  gl.bindFramebuffer(gl.FRAMEBUFFER, gl.createFramebuffer());
  const [target, attachment] = [gl.TEXTURE_2D, gl.COLOR_ATTACHMENT0];
  const texture = gl.getParameter(gl.TEXTURE_BINDING_2D) as WebGLTexture;
  gl.framebufferTexture2D(gl.FRAMEBUFFER, attachment, target, texture, 0);
  const rgba = new Uint8Array(width * height * 4);
  gl.readPixels(0, 0, width, height, gl.RGBA, gl.UNSIGNED_BYTE, rgba);
  const failed = gl.getError() !== gl.NO_ERROR;
  gl.getExtension('WEBGL_lose_context')?.loseContext();
  return failed ? null : rgba;
}

function fromPixels({ width, height, channels, data }: Picture & { kind: 'pixels' }): Rgb {
  if (data.length !== width * height * channels) {
    const message = `${data.length} bytes for ${width}x${height} pixels of ${channels} channels`;
    throw new VlmportError('ImageError', message, 'channels come last; one picture at a time');
  }
  if (channels === 4) return { width, height, data: onWhite(data) };
  if (channels === 3) return { width, height, data: Uint8Array.from(data) };
  const rgb = new Uint8Array(width * height * 3);
  for (let i = 0; i < data.length; i++) rgb.fill(data[i]!, i * 3, i * 3 + 3);
  return { width, height, data: rgb };
}

function checkSize(width: number, height: number): void {
  const inside = Math.max(width, height) <= MAX_SIDE && width * height <= MAX_PIXELS;
  if (width >= 1 && height >= 1 && inside) return;
  const limits = `${MAX_PIXELS / 1e6} million, and ${MAX_SIDE} a side`;
  const message = `${width}x${height} pixels; the limits are ${limits}`;
  throw new VlmportError('ImageError', message, 'scale it down first');
}

function hasPartialAlpha(rgba: Rgba): boolean {
  for (let i = 3; i < rgba.length; i += 4) {
    if (rgba[i] !== 255 && rgba[i] !== 0) return true;
  }
  return false;
}

/**
 * Lay RGBA on white.
 *
 * Source: Pillow 13, AlphaComposite.c, with an opaque white below.
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
