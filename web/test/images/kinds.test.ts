/**
 * Unsupported files get the codes that Python gives them (tests/runtime/test_image_kinds.py).
 */

import { expect, test } from 'vitest';
import { readFile } from '../../src/runtime/images/files.js';

const [NOTHING, FORMAT] = ['image.not-a-picture', 'image.unsupported-format'];
const ftyp = (brand: string) => `\0\0\0\x18ftyp${brand}\0\0\0\0mif1`;

test.each([
  ['%PDF-1.7 \n', 'PDF', FORMAT],
  ['<!doctype html><html>', 'a web page', NOTHING],
  ['  <svg xmlns="x">', 'SVG', FORMAT],
  [`<?xml version="1.0"?>\n<!-- ${'drawn '.repeat(50)}--><svg>`, 'SVG', FORMAT],
  ['<?xml version="1.0"?><rss>', 'XML', NOTHING],
  ['version https://git-lfs.github.com/spec/v1\noid', 'Git LFS', NOTHING],
  [ftyp('crx '), 'raw', FORMAT],
  [ftyp('M4A '), 'sound', NOTHING],
  [ftyp('mp42'), 'a video', NOTHING],
  ['\x1aE\xdf\xa3\x01\0\0\0', 'a video', NOTHING],
  ['RIFF\0\0\0\0AVI LIST', 'a video', NOTHING],
  ['RIFF\0\0\0\0WAVEfmt ', 'sound', NOTHING],
  ['\xff\x0a\0\0', 'JPEG XL', FORMAT],
  ['\0\0\0\x0cJXL \r\n\x87\n', 'JPEG XL', FORMAT],
  ['\0\0\0\x0cjP  \r\n\x87\n', 'JPEG 2000', FORMAT],
  ['II*\0\x10\0\0\0CR\x02\0', 'raw', FORMAT],
  ['II*\0\x08\0\0\0', 'TIFF', FORMAT], // which Python reads
  ['8BPS\0\x01', 'PSD', FORMAT],
  ['\0\0\x01\0\x01\0\x10\x10', 'ICO', FORMAT],
  ['P3\n2 2\n255\n', 'Netpbm', FORMAT],
  ['v/1\x01\x02\0\0\0', 'OpenEXR', FORMAT],
  [`${'\0'.repeat(128)}DICM`, 'DICOM', FORMAT],
  [`\x01\0\0\0${'\0'.repeat(36)} EMF`, 'EMF', FORMAT],
  ['once upon a time', 'text', NOTHING],
  ['\x01\x02\x03\x04\x05\x06\x07\x08\x09', 'not an image', NOTHING],
])('%o is named', async (data, said, code) => {
  const bytes = Uint8Array.from(data, one => one.charCodeAt(0));
  const wanted = { code, message: expect.stringContaining(said) as string };
  await expect(readFile(bytes)).rejects.toThrow(expect.objectContaining(wanted));
});
