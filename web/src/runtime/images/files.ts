/**
 * Read the header of an image file before it is decoded: format, size and orientation; and remove
 * the parts that make browsers change pixels.
 *
 * Browsers treat orientations, colour profiles and animations in different ways. So the file that
 * they get has none of them: colours are as stored, and the image is turned here.
 */

import { VlmportError } from '../../errors.js';
import { type Bytes, fromHex, latin, text, viewOf } from './bytes.js';
import { SAVE, notRead } from './kinds.js';

export type Format = 'PNG' | 'JPEG' | 'WebP' | 'GIF' | 'BMP' | 'AVIF' | 'HEIC';

export interface ImageFile {
  readonly format: Format;
  /** The size as stored, before turning. */
  readonly width: number;
  readonly height: number;
  /** The EXIF orientation, 1 to 8; 1 where the browser turns the image itself (AVIF, HEIC). */
  readonly orientation: number;
  /** Bits per channel of a PNG; else 8. */
  readonly depth: number;
  /** The first frame of an animation, where it does not cover the whole image. */
  readonly frame?: Frame;
  /** The file to decode. */
  readonly parts: readonly Bytes[];
}

/** The place of a frame, and the colour of the other pixels in Pillow. */
export interface Frame {
  readonly x: number;
  readonly y: number;
  readonly width: number;
  readonly height: number;
  readonly outside: readonly [number, number, number];
}

const KEPT_IN_PNG = ['IHDR', 'PLTE', 'tRNS', 'IDAT', 'IEND'];
const REMOVED_FROM_WEBP = ['ICCP', 'EXIF', 'XMP '];
const REMOVED_FLAGS = 0x20 | 0x08 | 0x04; // the same in WebP's VP8X
const XMP_IN_JPEG = 'http://ns.adobe.com/xap/1.0/\0';

/**
 * Read a file. Throws ImageError for one that is not an image, damaged or of an unsupported format.
 */
export async function readFile(bytes: Bytes): Promise<ImageFile> {
  const read = READERS.find(([begins]) => begins(bytes))?.[1];
  if (read === undefined) throw notRead(bytes);
  try {
    return await read(bytes);
  } catch (error) {
    if (error instanceof VlmportError) throw error;
    throw damaged(); // a RangeError: the file ends too early
  }
}

type Reader = (bytes: Bytes) => ImageFile | Promise<ImageFile>;

const READERS: readonly [(bytes: Bytes) => boolean, Reader][] = [
  [bytes => text(bytes, 0, 8) === '\x89PNG\r\n\x1a\n', readPng],
  [bytes => text(bytes, 0, 3) === '\xff\xd8\xff', readJpeg],
  [bytes => text(bytes, 0, 4) === 'RIFF' && text(bytes, 8, 4) === 'WEBP', readWebp],
  [bytes => ['GIF87a', 'GIF89a'].includes(text(bytes, 0, 6)), readGif],
  [bytes => text(bytes, 0, 2) === 'BM', readBmp],
  [bytes => heifFormat(bytes) !== null, readHeif],
];

function damaged(): VlmportError {
  const hint = 'download or copy it again';
  return new VlmportError('ImageError', 'image.damaged', 'the image is damaged or truncated', hint);
}

async function readPng(bytes: Bytes): Promise<ImageFile> {
  const view = viewOf(bytes);
  const parts = [bytes.subarray(0, 8)];
  let [exif, raw, xmp, ended, hasPixels] = [null as Bytes | null, '', '', false, false];
  for (let at = 8; at + 12 <= bytes.length && !ended;) {
    const [length, kind] = [view.getUint32(at), text(bytes, at + 4, 4)];
    const data = bytes.subarray(at + 8, at + 8 + length);
    if (at + 12 + length > bytes.length) throw damaged();
    if (KEPT_IN_PNG.includes(kind)) parts.push(bytes.subarray(at, at + 12 + length));
    if (kind === 'eXIf') exif = data;
    if (['tEXt', 'zTXt', 'iTXt'].includes(kind)) {
      const [name, value] = await pngText(kind, data);
      if (name === 'Raw profile type exif') raw = value;
      if (name === 'XML:com.adobe.xmp') xmp = value;
    }
    ended = kind === 'IEND';
    hasPixels ||= kind === 'IDAT';
    at += 12 + length;
  }
  if (!hasPixels || text(bytes, 12, 4) !== 'IHDR') throw damaged();
  if (exif === null && raw) exif = fromHex(raw.split('\n').slice(3).join(''));
  return {
    format: 'PNG',
    width: view.getUint32(16),
    height: view.getUint32(20),
    depth: bytes[24]!,
    orientation: orientationOf(exif, xmp),
    parts,
  };
}

/** Read the name and text of a PNG text chunk; the text is empty where it can't be unpacked. */
async function pngText(kind: string, data: Bytes): Promise<[string, string]> {
  const end = data.indexOf(0);
  const name = text(data, 0, Math.max(0, end));
  if (kind === 'tEXt') return [name, latin(data.subarray(end + 1))];
  if (kind === 'zTXt') return [name, latin(await inflated(data.subarray(end + 2)))];
  const packed = data[end + 1] === 1;
  const afterLanguage = data.indexOf(0, end + 3) + 1;
  const value = data.subarray(data.indexOf(0, afterLanguage) + 1);
  return [name, latin(packed ? await inflated(value) : value)];
}

const MAX_TEXT = 1 << 20; // Pillow's limit

async function inflated(packed: Bytes): Promise<Bytes> {
  try {
    return await inflate([packed], MAX_TEXT);
  } catch {
    return new Uint8Array(0);
  }
}

/** Unpack up to `most` bytes of zlib data. Throws for damaged data. */
export async function inflate(packed: readonly Bytes[], most: number): Promise<Bytes> {
  const unpacked = new Uint8Array(most);
  let length = 0;
  const stream = new Blob([...packed]).stream().pipeThrough(new DecompressionStream('deflate'));
  const reader = stream.getReader();
  for (;;) {
    const { value, done } = await reader.read();
    if (done) break;
    const room = value.subarray(0, most - length);
    unpacked.set(room, length);
    length += room.length;
    if (length === most) {
      await reader.cancel();
      break;
    }
  }
  return unpacked.subarray(0, length);
}

function readJpeg(bytes: Bytes): ImageFile {
  const view = viewOf(bytes);
  const parts = [bytes.subarray(0, 2)];
  let [exif, xmp, width, height] = [null as Bytes | null, '', 0, 0];
  for (let at = 2; ;) {
    const marker = view.getUint8(at + 1);
    if (bytes[at] !== 0xff || marker === 0xff || marker === 0) {
      at += 1; // a fill byte, or an unknown one
      continue;
    }
    if (marker === 0xda) {
      parts.push(bytes.subarray(at));
      break;
    }
    const length = 2 + view.getUint16(at + 2);
    const segment = bytes.subarray(at, at + length);
    const data = segment.subarray(4);
    if (marker >= 0xc0 && marker <= 0xcf && ![0xc4, 0xc8, 0xcc].includes(marker)) {
      [height, width] = [view.getUint16(at + 5), view.getUint16(at + 7)];
    }
    if (marker === 0xe1 && text(data, 0, 6) === 'Exif\0\0') exif ??= data;
    if (marker === 0xe1 && text(data, 0, XMP_IN_JPEG.length) === XMP_IN_JPEG) xmp ||= latin(data);
    const isMetadata = (marker >= 0xe1 && marker <= 0xef && marker !== 0xee) || marker === 0xfe;
    if (!isMetadata) parts.push(segment); // kept: JFIF's, Adobe's, the tables
    at += length;
  }
  const orientation = orientationOf(exif, xmp);
  return { format: 'JPEG', width, height, depth: 8, orientation, parts };
}

function readWebp(bytes: Bytes): ImageFile {
  const view = viewOf(bytes);
  const head = bytes.slice(0, 12);
  const parts = [head];
  let [exif, xmp, size] = [null as Bytes | null, '', null as [number, number] | null];
  let frame: Frame | undefined;
  let isClear = false; // pixels outside of the frame are then transparent, else black
  const end = Math.min(bytes.length, 8 + view.getUint32(4, true));
  for (let at = 12; at + 8 <= end;) {
    const [kind, length] = [text(bytes, at, 4), view.getUint32(at + 4, true)];
    const after = at + 8 + length + (length % 2);
    if (at + 8 + length > bytes.length) throw damaged();
    const data = bytes.subarray(at + 8, at + 8 + length);
    size ??= webpSize(kind, data);
    if (kind === 'EXIF') exif ??= data;
    if (kind === 'XMP ') xmp ||= latin(data);
    if (kind === 'ANMF') frame ??= webpFrame(data);
    if (kind === 'VP8X') {
      isClear = (data[0]! & 0x10) !== 0;
      const plain = bytes.slice(at, after);
      plain[8]! &= ~REMOVED_FLAGS;
      parts.push(plain);
    } else if (!REMOVED_FROM_WEBP.includes(kind)) parts.push(bytes.subarray(at, after));
    at = after;
  }
  if (size === null) throw damaged();
  const length = parts.reduce((sum, part) => sum + part.length, 0);
  viewOf(head).setUint32(4, length - 8, true);
  const [width, height] = size;
  const orientation = orientationOf(exif, xmp);
  const file: ImageFile = { format: 'WebP', width, height, depth: 8, orientation, parts };
  return frame && !isClear ? { ...file, frame } : file;
}

function webpFrame(data: Bytes): Frame {
  const view = viewOf(data);
  const at24 = (at: number) => view.getUint16(at, true) + (view.getUint8(at + 2) << 16);
  const [x, y, width, height] = [2 * at24(0), 2 * at24(3), at24(6) + 1, at24(9) + 1];
  return { x, y, width, height, outside: [0, 0, 0] };
}

function webpSize(kind: string, data: Bytes): [number, number] | null {
  const view = viewOf(data);
  if (kind === 'VP8X') {
    const at24 = (at: number) => view.getUint16(at, true) + (view.getUint8(at + 2) << 16);
    return [at24(4) + 1, at24(7) + 1];
  }
  if (kind === 'VP8 ') return [view.getUint16(6, true) & 0x3fff, view.getUint16(8, true) & 0x3fff];
  if (kind !== 'VP8L') return null;
  const bits = view.getUint32(1, true);
  return [(bits & 0x3fff) + 1, ((bits >>> 14) & 0x3fff) + 1];
}

/**
 * Read a GIF. Its size is the screen's, or larger where the first frame is, as in browsers and
 * Pillow.
 */
function readGif(bytes: Bytes): ImageFile {
  const view = viewOf(bytes);
  let [width, height] = [view.getUint16(6, true), view.getUint16(8, true)];
  const flags = view.getUint8(10);
  let at = 13 + (flags & 0x80 ? 3 * 2 ** ((flags & 7) + 1) : 0);
  let isClear = false;
  while (view.getUint8(at) === 0x21) {
    if (view.getUint8(at + 1) === 0xf9) isClear = (view.getUint8(at + 3) & 1) !== 0;
    for (at += 2; view.getUint8(at) !== 0;) at += 1 + view.getUint8(at);
    at += 1;
  }
  if (view.getUint8(at) !== 0x2c) throw damaged();
  const at16 = (offset: number) => view.getUint16(at + offset, true);
  const place = { x: at16(1), y: at16(3), width: at16(5), height: at16(7) };
  width = Math.max(width, place.x + place.width);
  height = Math.max(height, place.y + place.height);
  const colours = view.getUint8(at + 9) & 0x80 ? at + 10 : flags & 0x80 ? 13 : null;
  const [r, g, b] = colours === null ? [0, 0, 0] : bytes.subarray(colours, colours + 3);
  const file: ImageFile = {
    format: 'GIF',
    width,
    height,
    depth: 8,
    orientation: 1,
    parts: [bytes],
  };
  return isClear ? file : { ...file, frame: { ...place, outside: [r!, g!, b!] } };
}

/** Read a BMP of a kind that browsers and Pillow read alike; all others are refused. */
function readBmp(bytes: Bytes): ImageFile {
  const view = viewOf(bytes);
  const old = view.getUint32(14, true) === 12;
  const width = old ? view.getUint16(18, true) : view.getInt32(18, true);
  const height = old ? view.getUint16(20, true) : Math.abs(view.getInt32(22, true));
  const bits = view.getUint16(old ? 24 : 28, true);
  const packing = old ? 0 : view.getUint32(30, true);
  if (![1, 4, 8, 24, 32].includes(bits) || !(packing === 0 || (packing === 3 && bits === 32))) {
    const message = `a BMP of ${bits} bits per pixel with compression ${packing} is not supported`;
    throw new VlmportError('ImageError', 'image.unsupported-format', message, 'save it as PNG');
  }
  const begins = view.getUint32(10, true);
  const colours = bits > 8 || old ? 0 : view.getUint32(46, true) || 2 ** bits;
  if (14 + view.getUint32(14, true) + 4 * colours > begins) throw damaged();
  const ends = begins + 4 * Math.ceil((width * bits) / 32) * height;
  const parts = ends > bytes.length ? [] : [bytes]; // too short to decode
  return { format: 'BMP', width, height, depth: 8, orientation: 1, parts };
}

function heifFormat(bytes: Bytes): Format | null {
  if (text(bytes, 4, 4) !== 'ftyp') return null;
  const brand = text(bytes, 8, 4);
  const length = Math.min(256, viewOf(bytes).getUint32(0));
  if (['avif', 'avis'].includes(brand)) return 'AVIF';
  if (['heic', 'heix', 'heim', 'heis', 'hevc', 'hevx', 'hevm'].includes(brand)) return 'HEIC';
  if (!['mif1', 'msf1', 'mif2'].includes(brand)) return null;
  return text(bytes, 16, length - 16).includes('avi') ? 'AVIF' : 'HEIC';
}

/**
 * Read an AVIF or HEIC file. Of the sizes in it the largest is the image's, the others are tiles'.
 */
function readHeif(bytes: Bytes): ImageFile {
  const view = viewOf(bytes);
  const file = bytes.slice();
  let [width, height] = [0, 0];
  const walk = (from: number, to: number) => {
    for (let at = from; at + 8 <= to;) {
      const [length, kind] = [view.getUint32(at), text(bytes, at + 4, 4)];
      const end = length === 0 ? to : length === 1 ? at + view.getUint32(at + 12) : at + length;
      if (end > to || end < at + 8) throw damaged();
      if (kind === 'meta') walk(at + 12, end);
      if (kind === 'iprp' || kind === 'ipco') walk(at + 8, end);
      if (kind === 'ispe' && view.getUint32(at + 12) * view.getUint32(at + 16) > width * height) {
        [width, height] = [view.getUint32(at + 12), view.getUint32(at + 16)];
      }
      if (kind === 'auxC' && text(bytes, at + 12, 64).includes(':alpha')) throw transparentAvif();
      if (kind === 'colr') plainColour(file, at + 8);
      at = end;
    }
  };
  walk(0, bytes.length);
  if (!width) throw damaged();
  const format = heifFormat(bytes)!;
  return { format, width, height, depth: 8, orientation: 1, parts: [file] };
}

/** Chromium reads the alpha of AVIF as if it had a limited range, which is wrong. */
function transparentAvif(): VlmportError {
  const message = 'an AVIF image with transparency is not supported: browsers read it differently';
  const hint = 'save it as PNG or WebP, or without transparency';
  return new VlmportError('ImageError', 'image.no-exact-alpha', message, hint);
}

/**
 * Replace a profile by a free box, and primaries and transfer by those of sRGB, without a new
 * length.
 */
function plainColour(file: Bytes, at: number): void {
  if (text(file, at, 4) !== 'nclx') file.set(new TextEncoder().encode('free'), at - 4);
  else file.set([0, 1, 0, 13], at + 4);
}

/** Return EXIF's orientation, else the one in XMP (as Pillow 13 does), else 1. */
function orientationOf(exif: Bytes | null, xmp: string): number {
  const found =
    (exif === null ? undefined : exifOrientation(exif)) ??
    Number(/tiff:Orientation(?:="|>)([0-9])/.exec(xmp)?.[1] ?? 1);
  return found >= 1 && found <= 8 ? found : 1;
}

function exifOrientation(exif: Bytes): number | undefined {
  const tiff = text(exif, 0, 6) === 'Exif\0\0' ? exif.subarray(6) : exif;
  const little = text(tiff, 0, 2) === 'II';
  if (!little && text(tiff, 0, 2) !== 'MM') return undefined;
  const view = viewOf(tiff);
  try {
    const directory = view.getUint32(4, little);
    for (let i = 0; i < view.getUint16(directory, little); i++) {
      const at = directory + 2 + 12 * i;
      if (view.getUint16(at, little) !== 0x0112) continue;
      const kind = view.getUint16(at + 2, little);
      if (kind === 3) return view.getUint16(at + 8, little);
      if (kind === 4) return view.getUint32(at + 8, little);
    }
  } catch {
    // The data end too early: there is no orientation.
  }
  return undefined;
}

/** The error for a file that the browser can't decode. */
export function undecoded({ format }: ImageFile): VlmportError {
  if (format !== 'HEIC') return damaged();
  const message = "this browser can't read HEIC (HEIF) images";
  return new VlmportError('ImageError', 'image.unsupported-format', message, SAVE);
}
