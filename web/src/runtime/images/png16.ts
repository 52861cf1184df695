/**
 * Decode PNG with 16 bits per channel, which each browser rounds to 8 bits in its own way. Here it
 * is done as in Pillow: gray is divided by 257, other channels keep the high byte.
 */

import { VlmportError } from '../../errors.js';
import type { Bytes } from './bytes.js';
import { type ImageFile, inflate } from './files.js';

const CHANNELS: Readonly<Record<number, number>> = { 0: 1, 2: 3, 4: 2, 6: 4 };
// Adam7: the first column and row of each pass, and the steps between.
const PASSES = [
  [0, 0, 8, 8],
  [4, 0, 8, 8],
  [0, 4, 4, 8],
  [2, 0, 4, 4],
  [0, 2, 2, 4],
  [1, 0, 2, 2],
  [0, 1, 1, 2],
] as const;

/**
 * Decode to RGBA of 8 bits, without turning. Throws ImageError where the data don't match the
 * header.
 */
export async function decodePng16({ parts, width, height }: ImageFile): Promise<Bytes> {
  const [, header, ...chunks] = parts;
  const [color, , , interlaced] = header!.subarray(17, 21);
  const channels = CHANNELS[color!];
  const clear = chunks.find(chunk => kindOf(chunk) === 'tRNS')?.subarray(8);
  if (channels === undefined || (clear && color === 2)) throw damaged('an unknown kind');
  const passes = interlaced ? PASSES : ([[0, 0, 1, 1]] as const);
  const sizes = passes.map(([x, y, dx, dy]) => {
    const [columns, rows] = [Math.ceil((width - x) / dx), Math.ceil((height - y) / dy)];
    return columns > 0 && rows > 0 ? { columns, rows } : { columns: 0, rows: 0 };
  });
  const total = sizes.reduce((sum, one) => sum + one.rows * (1 + one.columns * channels * 2), 0);
  const packed = chunks.filter(chunk => kindOf(chunk) === 'IDAT');
  let data: Bytes;
  try {
    data = await inflate(
      packed.map(chunk => chunk.subarray(8, -4)),
      total,
    );
  } catch {
    throw damaged('its data');
  }
  if (data.length < total) throw damaged('its length');
  const rgba = new Uint8Array(width * height * 4);
  const transparent = clear && color === 0 ? clear[0]! * 256 + clear[1]! : -1;
  let at = 0;
  passes.forEach(([x0, y0, dx, dy], pass) => {
    const { columns, rows } = sizes[pass]!;
    const length = columns * channels * 2;
    let above: Bytes = new Uint8Array(length);
    for (let row = 0; row < rows; row++, at += 1 + length) {
      const line = data.subarray(at + 1, at + 1 + length);
      unfilter(data[at]!, line, above, channels * 2);
      for (let column = 0; column < columns; column++) {
        const to = 4 * ((y0 + row * dy) * width + x0 + column * dx);
        write(rgba, to, line, column * channels * 2, channels, transparent);
      }
      above = line;
    }
  });
  return rgba;
}

function write(
  rgba: Bytes,
  to: number,
  line: Bytes,
  from: number,
  channels: number,
  transparent: number,
): void {
  if (channels === 1) {
    const value = line[from]! * 256 + line[from + 1]!;
    rgba.fill(Math.round(value / 257), to, to + 3); // never halfway, because 257 is odd
    rgba[to + 3] = value === transparent ? 0 : 255;
  } else {
    for (let c = 0; c < 3; c++) rgba[to + c] = line[from + (channels > 2 ? 2 * c : 0)]!;
    rgba[to + 3] = channels % 2 ? 255 : line[from + 2 * (channels - 1)]!;
  }
}

/** Undo one of PNG's five filters in place. */
function unfilter(filter: number, line: Bytes, above: Bytes, pixel: number): void {
  if (filter > 4) throw damaged('an unknown filter');
  for (let i = 0; i < line.length; i++) {
    const left = i >= pixel ? line[i - pixel]! : 0;
    const up = above[i]!;
    const corner = i >= pixel ? above[i - pixel]! : 0;
    if (filter === 1) line[i]! += left;
    else if (filter === 2) line[i]! += up;
    else if (filter === 3) line[i]! += (left + up) >> 1;
    else if (filter === 4) line[i]! += paeth(left, up, corner);
  }
}

function paeth(left: number, up: number, corner: number): number {
  const guess = left + up - corner;
  const [a, b, c] = [Math.abs(guess - left), Math.abs(guess - up), Math.abs(guess - corner)];
  return a <= b && a <= c ? left : b <= c ? up : corner;
}

const kindOf = (chunk: Bytes) => String.fromCharCode(...chunk.subarray(4, 8));

function damaged(what: string): VlmportError {
  const message = `the image is damaged or truncated: a 16-bit PNG (${what})`;
  const hint = 'download or copy it again, or save it with 8 bits';
  return new VlmportError('ImageError', 'image.damaged', message, hint);
}
