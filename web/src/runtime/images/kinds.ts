/**
 * What a file is that no reader takes: another picture format, or no picture at all (the twin of
 * vlmport/runtime/images/kinds.py).
 */

import type { ErrorCode } from '../../error-codes.js';
import { VlmportError } from '../../errors.js';
import { type Bytes, text } from './bytes.js';

const FORMATS = 'PNG, JPEG, WebP, AVIF, GIF and BMP are read';
export const SAVE = `save it as PNG or JPEG: ${FORMATS}`;
const DRAW = 'draw it at the size that you need: save it as PNG';
const PAGE = 'save a page of it as PNG';
const VIDEO = 'give some of its frames as pictures';

interface Kind {
  readonly message: string;
  readonly hint: string;
  readonly code: ErrorCode;
}

const picture = (what: string, hint = SAVE): Kind => ({
  message: `${what}, which is not read`,
  hint,
  code: 'image.unsupported-format',
});

const other = (what: string, hint = FORMATS): Kind => ({
  message: `not a picture but ${what}`,
  hint,
  code: 'image.not-a-picture',
});

const RAW = picture('a camera raw file', 'develop it: save it as JPEG, PNG or WebP');
const SVG = picture('an SVG drawing', DRAW);
const JXL = picture('a JPEG XL picture');
const JPEG_2000 = picture('a JPEG 2000 picture');
const EPS = picture('a PostScript file (EPS)', PAGE);
const NETPBM = picture('a Netpbm picture (PBM, PGM, PPM or PAM)');
const WEB_PAGE = other('a web page');
const FILM = other('a video (MP4 or MOV)', VIDEO);
const SOUND = other('sound (M4A or the like)');

/** What stands after `ftyp` → what it is; anything else there is a video. */
const BRANDS: ReadonlyMap<string, Kind> = new Map([
  ['crx ', RAW],
  ['jxl ', JXL],
  ...['jp2 ', 'jpx ', 'jph '].map(brand => [brand, JPEG_2000] as const),
  ...['M4A ', 'M4B ', 'F4A ', 'F4B '].map(brand => [brand, SOUND] as const),
]);

/** What a file begins with, in small letters → what it is. The first that fits counts. */
const BEGINNINGS: readonly (readonly [string, Kind])[] = [
  ['%pdf', picture('a PDF', PAGE)],
  ['8bps', picture('a Photoshop file (PSD)')],
  ['8bpb', picture('a Photoshop file (PSB)')],
  ['\xff\x0a', JXL],
  ['\0\0\0\x0cjxl ', JXL],
  ['\0\0\0\x0cjp  ', JPEG_2000],
  ['\xff\x4f\xff\x51', JPEG_2000],
  ['ii\xbc', picture('a JPEG XR picture')],
  ['ii*\0\x10\0\0\0cr', RAW], // Canon CR2
  ['fujifilmccd-raw', RAW],
  ...['iiro', 'iirs', 'mmor', 'iiu\0', 'fovb', '\0mrm'].map(start => [start, RAW] as const),
  ['ii*\0', picture('a TIFF picture')],
  ['mm\0*', picture('a TIFF picture')],
  ['%!ps', EPS],
  ['\xc5\xd0\xd3\xc6', EPS],
  ['\xd7\xcd\xc6\x9a', picture('a Windows metafile (WMF)', DRAW)],
  ['gimp xcf', picture('a GIMP file (XCF)')],
  ['v/1\x01', picture('an OpenEXR picture')],
  ['#?radiance', picture('a Radiance picture (HDR)')],
  ['#?rgbe', picture('a Radiance picture (HDR)')],
  ['dds ', picture('a DirectDraw texture (DDS)')],
  ['\xabktx ', picture('a texture (KTX)')],
  ['qoif', picture('a QOI picture')],
  ['flif', picture('a FLIF picture')],
  ['bpg\xfb', picture('a BPG picture')],
  ['icns', picture('an icon of macOS (ICNS)')],
  ['\0\0\x01\0', picture('an icon (ICO)')],
  ['\0\0\x02\0\0\0\0\0', picture('a Targa picture (TGA)')],
  ['\0\0\x0a\0\0\0\0\0', picture('a Targa picture (TGA)')],
  ['\0\0\x02\0', picture('a mouse pointer (CUR)')],
  ['\x8amng', picture('an MNG animation')],
  ['\x8bjng', picture('a JNG picture')],
  ['at&tform', picture('a DjVu document', PAGE)],
  ['simple  =', picture('a FITS picture')],
  ['\x01\xda', picture('an SGI picture')],
  ['/* xpm', picture('an XPM picture')],
  ...['1', '2', '3', '4', '5', '6', '7'].flatMap(number =>
    ['\n', '\r', ' ', '\t', '#'].map(space => [`p${number}${space}`, NETPBM] as const),
  ),
  ['pf\n', picture('a PFM picture')],
  ['pk\x03\x04', other('a ZIP archive or an Office file')],
  ['<svg', SVG],
  ['<!doctype svg', SVG],
  ['<!doctype', WEB_PAGE],
  ['<html', WEB_PAGE],
  ['<?xml', other('XML')],
  ['{', other('JSON')],
  ['\x1f\x8b', other('a gzip archive')],
  ['version https://git-lfs', other('a Git LFS pointer: its file was not fetched', 'git lfs pull')],
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

/** The error for a file that is none of the formats that are read, by its first bytes. */
export function notRead(bytes: Bytes): VlmportError {
  const { message, hint, code } = kindOf(bytes);
  return new VlmportError('ImageError', code, message, hint);
}

const HEAD = 512; // bytes that are looked at: an SVG drawing may begin with a comment
const SPACE = /^[\xef\xbb\xbf \t\r\n]+/;
const SMALL = /[A-Z]+/g; // of ASCII alone

function kindOf(bytes: Bytes): Kind {
  const head = text(bytes, 0, HEAD);
  const start = head.replace(SPACE, '').replace(SMALL, found => found.toLowerCase());
  if (head.slice(4, 8) === 'ftyp') return BRANDS.get(head.slice(8, 12)) ?? FILM;
  if (start.startsWith('riff')) return RIFFS.get(start.slice(8, 12)) ?? other('a RIFF file');
  if (head.slice(128, 132) === 'DICM') return picture('a DICOM picture');
  if (head.slice(40, 44) === ' EMF') return picture('a Windows metafile (EMF)', DRAW);
  if (/^<(\?xml|!--)/.test(start) && start.includes('<svg')) return SVG;
  const known = BEGINNINGS.find(([beginning]) => start.startsWith(beginning));
  if (known) return known[1];
  if (/^[\t\n\r\x20-\x7e]*$/.test(head)) return other('text');
  return { message: 'not a picture', hint: FORMATS, code: 'image.not-a-picture' };
}
