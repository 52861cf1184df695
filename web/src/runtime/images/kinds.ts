/**
 * Name the kind of a file that can't be read: another image format, or not an image (the twin of
 * vlmport/runtime/images/kinds.py).
 */

import type { ErrorCode } from '../../error-codes.js';
import { VlmportError } from '../../errors.js';
import { type Bytes, text } from './bytes.js';

const FORMATS = 'PNG, JPEG, WebP, AVIF, GIF and BMP are supported';
export const SAVE = `save it as PNG or JPEG: ${FORMATS}`;
const DRAW = 'convert it to PNG, at the size that you need';
const PAGE = 'convert a page of it to PNG';
const VIDEO = 'give some of its frames as images';

interface Kind {
  readonly message: string;
  readonly hint: string;
  readonly code: ErrorCode;
}

const format = (name: string, hint = SAVE): Kind => ({
  message: `${name} is not supported`,
  hint,
  code: 'image.unsupported-format',
});

const other = (name: string, hint = FORMATS): Kind => ({
  message: `not an image but ${name}`,
  hint,
  code: 'image.not-a-picture',
});

const RAW = format('a camera raw file', 'develop it: save it as JPEG, PNG or WebP');
const SVG = format('an SVG drawing', DRAW);
const JXL = format('a JPEG XL image');
const JPEG_2000 = format('a JPEG 2000 image');
const EPS = format('a PostScript file (EPS)', PAGE);
const NETPBM = format('a Netpbm image (PBM, PGM, PPM or PAM)');
const WEB_PAGE = other('a web page');
const FILM = other('a video (MP4 or MOV)', VIDEO);
const SOUND = other('sound (M4A)');

/** The brand after `ftyp` → the kind; any other brand is a video. */
const BRANDS: ReadonlyMap<string, Kind> = new Map([
  ['crx ', RAW],
  ['jxl ', JXL],
  ...['jp2 ', 'jpx ', 'jph '].map(brand => [brand, JPEG_2000] as const),
  ...['M4A ', 'M4B ', 'F4A ', 'F4B '].map(brand => [brand, SOUND] as const),
]);

/** The beginning of a file, in lower case → the kind. The first match counts. */
const BEGINNINGS: readonly (readonly [string, Kind])[] = [
  ['%pdf', format('a PDF', PAGE)],
  ['8bps', format('a Photoshop file (PSD)')],
  ['8bpb', format('a Photoshop file (PSB)')],
  ['\xff\x0a', JXL],
  ['\0\0\0\x0cjxl ', JXL],
  ['\0\0\0\x0cjp  ', JPEG_2000],
  ['\xff\x4f\xff\x51', JPEG_2000],
  ['ii\xbc', format('a JPEG XR image')],
  ['ii*\0\x10\0\0\0cr', RAW], // Canon CR2
  ['fujifilmccd-raw', RAW],
  ...['iiro', 'iirs', 'mmor', 'iiu\0', 'fovb', '\0mrm'].map(start => [start, RAW] as const),
  ['ii*\0', format('a TIFF image')],
  ['mm\0*', format('a TIFF image')],
  ['%!ps', EPS],
  ['\xc5\xd0\xd3\xc6', EPS],
  ['\xd7\xcd\xc6\x9a', format('a Windows metafile (WMF)', DRAW)],
  ['gimp xcf', format('a GIMP file (XCF)')],
  ['v/1\x01', format('an OpenEXR image')],
  ['#?radiance', format('a Radiance image (HDR)')],
  ['#?rgbe', format('a Radiance image (HDR)')],
  ['dds ', format('a DirectDraw texture (DDS)')],
  ['\xabktx ', format('a texture (KTX)')],
  ['qoif', format('a QOI image')],
  ['flif', format('a FLIF image')],
  ['bpg\xfb', format('a BPG image')],
  ['icns', format('an icon of macOS (ICNS)')],
  ['\0\0\x01\0', format('an icon (ICO)')],
  ['\0\0\x02\0\0\0\0\0', format('a Targa image (TGA)')],
  ['\0\0\x0a\0\0\0\0\0', format('a Targa image (TGA)')],
  ['\0\0\x02\0', format('a mouse pointer (CUR)')],
  ['\x8amng', format('an MNG animation')],
  ['\x8bjng', format('a JNG image')],
  ['at&tform', format('a DjVu document', PAGE)],
  ['simple  =', format('a FITS image')],
  ['\x01\xda', format('an SGI image')],
  ['/* xpm', format('an XPM image')],
  ...['1', '2', '3', '4', '5', '6', '7'].flatMap(number =>
    ['\n', '\r', ' ', '\t', '#'].map(space => [`p${number}${space}`, NETPBM] as const),
  ),
  ['pf\n', format('a PFM image')],
  ['pk\x03\x04', other('a ZIP archive or an Office file')],
  ['<svg', SVG],
  ['<!doctype svg', SVG],
  ['<!doctype', WEB_PAGE],
  ['<html', WEB_PAGE],
  ['<?xml', other('XML')],
  ['{', other('JSON')],
  ['\x1f\x8b', other('a gzip archive')],
  [
    'version https://git-lfs',
    other('a Git LFS pointer whose file was not fetched', 'git lfs pull'),
  ],
  ['\x1ae\xdf\xa3', other('a video (Matroska or WebM)', VIDEO)],
  ['flv\x01', other('a video (FLV)', VIDEO)],
  ['\0\0\x01\xba', other('a video (MPEG)', VIDEO)],
  ['id3', other('an MP3')],
  ['oggs', other('an Ogg file')],
  ['flac', other('sound (FLAC)')],
  ['\x7felf', other('a program')],
  ['mz', other('a program')],
];
const RIFFS: ReadonlyMap<string, Kind> = new Map([
  ['avi ', other('a video (AVI)', VIDEO)],
  ['wave', other('sound (WAV)')],
]);

/** The error for a file of an unsupported kind, by its first bytes. */
export function notRead(bytes: Bytes): VlmportError {
  const { message, hint, code } = kindOf(bytes);
  return new VlmportError('ImageError', code, message, hint);
}

const HEAD = 512; // bytes that are compared: an SVG drawing may begin with a comment
const SPACE = /^[\xef\xbb\xbf \t\r\n]+/;
const CAPITALS = /[A-Z]+/g; // ASCII only

function kindOf(bytes: Bytes): Kind {
  const head = text(bytes, 0, HEAD);
  const start = head.replace(SPACE, '').replace(CAPITALS, found => found.toLowerCase());
  if (head.slice(4, 8) === 'ftyp') return BRANDS.get(head.slice(8, 12)) ?? FILM;
  if (start.startsWith('riff')) return RIFFS.get(start.slice(8, 12)) ?? other('a RIFF file');
  if (head.slice(128, 132) === 'DICM') return format('a DICOM image');
  if (head.slice(40, 44) === ' EMF') return format('a Windows metafile (EMF)', DRAW);
  if (/^<(\?xml|!--)/.test(start) && start.includes('<svg')) return SVG;
  const known = BEGINNINGS.find(([beginning]) => start.startsWith(beginning));
  if (known) return known[1];
  if (/^[\t\n\r\x20-\x7e]*$/.test(head)) return other('text');
  return { message: 'not an image', hint: FORMATS, code: 'image.not-a-picture' };
}
