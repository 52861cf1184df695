/**
 * Read the pixels of a bitmap exactly, or throw an error.
 *
 * A 2D canvas stores colours multiplied by their alpha, which loses bits of half transparent
 * pixels. Bitmaps with such pixels are read through WebGL, which does not multiply. Browsers that
 * protect privacy return other pixels than those that were drawn (Firefox's resistFingerprinting,
 * Brave), and a canvas that is too large returns none. To detect both, known pixels are drawn and
 * read once.
 */

import { VlmportError, firstLine } from '../../errors.js';

export type Rgba = Uint8ClampedArray<ArrayBuffer> | Uint8Array<ArrayBuffer>;

/** Options for a bitmap with the numbers of its file. */
export const AS_STORED: ImageBitmapOptions = {
  colorSpaceConversion: 'none',
  premultiplyAlpha: 'none',
  imageOrientation: 'from-image',
};

const TILE = 2048; // pixels a side that are read at a time; every browser supports this canvas
const LONG = 8192; // sides up to here are not tested

/** Called with each part of a bitmap: its RGBA, and its place. */
type OnTile = (rgba: Rgba, x: number, y: number, width: number, height: number) => void;

/**
 * Read a bitmap part by part.
 *
 * Throws ImageError where it can't be read exactly: 'image.readback' or 'image.no-exact-alpha'.
 */
export async function readBitmap(bitmap: ImageBitmap, onTile: OnTile): Promise<void> {
  canvasTells ??= await tryCanvas();
  await tryLength(bitmap);
  let partial = false;
  drawTiles(bitmap, (rgba, ...place) => {
    partial ||= hasPartialAlpha(rgba);
    if (!partial) onTile(rgba, ...place);
  });
  if (!partial) return;
  if (!(webGlTells ??= await tryWebGl()) || !(await readExactly(bitmap, onTile))) {
    const message = "half transparent pixels of this image can't be read exactly here";
    const hint = 'save it without transparency (WebGL is missing)';
    throw new VlmportError('ImageError', 'image.no-exact-alpha', message, hint);
  }
}

/** Read a bitmap part by part through WebGL; false where that fails. */
async function readExactly(bitmap: ImageBitmap, onTile: OnTile): Promise<boolean> {
  if (Math.max(bitmap.width, bitmap.height) <= TILE) {
    const rgba = readByWebGl(bitmap);
    if (rgba !== null) onTile(rgba, 0, 0, bitmap.width, bitmap.height);
    return rgba !== null;
  }
  for (const [x, y, width, height] of tiles(bitmap)) {
    const part = await createImageBitmap(bitmap, x, y, width, height, AS_STORED);
    const rgba = readByWebGl(part);
    part.close();
    if (rgba === null) return false;
    onTile(rgba, x, y, width, height);
  }
  return true;
}

function* tiles({ width, height }: ImageBitmap): Generator<[number, number, number, number]> {
  for (let y = 0; y < height; y += TILE) {
    for (let x = 0; x < width; x += TILE) {
      yield [x, y, Math.min(TILE, width - x), Math.min(TILE, height - y)];
    }
  }
}

function drawTiles(bitmap: ImageBitmap, onTile: OnTile): void {
  const canvas = new OffscreenCanvas(Math.min(TILE, bitmap.width), Math.min(TILE, bitmap.height));
  const context = canvas.getContext('2d', { willReadFrequently: true });
  try {
    if (context === null) throw new Error('no 2D canvas');
    context.globalCompositeOperation = 'copy';
    for (const [x, y, width, height] of tiles(bitmap)) {
      context.drawImage(bitmap, x, y, width, height, 0, 0, width, height);
      onTile(context.getImageData(0, 0, width, height).data, x, y, width, height);
    }
  } catch (error) {
    const tainted = error instanceof DOMException && error.name === 'SecurityError';
    const message = `the pixels can't be read (${firstLine(error)})`;
    const hint = tainted
      ? "the image is from another origin: load it with crossorigin='anonymous'"
      : 'scale it down first';
    throw new VlmportError('ImageError', 'image.unreadable', message, hint);
  }
}

/** Read the pixels of the file; null where WebGL is missing or too small. */
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

// Results of the tests. A failed one is repeated, because the user may have allowed it since.
let canvasTells: true | undefined;
let webGlTells: true | undefined;
const lengthsThatWork = new Set<string>();

/** Make pixels of many colours, which a browser returns only if it does not change them. */
function pattern(width: number, height: number, alpha: (i: number) => number): ImageData {
  const data = new Uint8ClampedArray(width * height * 4);
  for (let i = 0, state = 1; i < data.length; i++) {
    state = (state * 1103515245 + 12345) % 2 ** 31;
    data[i] = i % 4 === 3 ? alpha(i >> 2) : state >> 16;
  }
  return new ImageData(data, width, height);
}

/** Draw a pattern and read it back. Throws ImageError where the pixels differ. */
async function tryCanvas(): Promise<true> {
  const drawn = pattern(64, 64, () => 255);
  const bitmap = await createImageBitmap(drawn, AS_STORED);
  let same = true;
  drawTiles(bitmap, rgba => (same = isSame(rgba, drawn.data)));
  bitmap.close();
  if (same) return true;
  const message = 'this browser changes the pixels of a canvas, as a protection from tracking';
  const hint = 'allow this page to read canvases (in Brave: Shields; in Firefox: the permission)';
  throw new VlmportError('ImageError', 'image.readback', message, hint);
}

async function tryWebGl(): Promise<true | undefined> {
  const drawn = pattern(16, 16, i => i);
  const bitmap = await createImageBitmap(drawn, AS_STORED);
  const rgba = readByWebGl(bitmap);
  bitmap.close();
  return (rgba !== null && isSame(rgba, drawn.data)) || undefined;
}

/** Test a line as long as the bitmap. Throws ImageError where the browser's canvas cuts it. */
async function tryLength({ width, height }: ImageBitmap): Promise<void> {
  for (const [columns, rows] of [
    [width, 1],
    [1, height],
  ] as const) {
    if (columns * rows <= LONG || lengthsThatWork.has(`${columns}x${rows}`)) continue;
    const drawn = pattern(columns, rows, () => 255);
    const whole = new Uint8Array(columns * rows * 4);
    const bitmap = await createImageBitmap(drawn, AS_STORED);
    drawTiles(bitmap, (rgba, x, y) => whole.set(rgba, (x + y) * 4));
    bitmap.close();
    if (!isSame(whole, drawn.data)) {
      const message = `this browser can't read an image of ${width}x${height} pixels`;
      const hint = 'cut it into pieces, or scale it down first';
      throw new VlmportError('ImageError', 'image.readback', message, hint);
    }
    lengthsThatWork.add(`${columns}x${rows}`);
  }
}

const isSame = (a: Rgba, b: Rgba) => a.length === b.length && a.every((value, i) => value === b[i]);

function hasPartialAlpha(rgba: Rgba): boolean {
  for (let i = 3; i < rgba.length; i += 4) {
    if (rgba[i] !== 255 && rgba[i] !== 0) return true;
  }
  return false;
}
