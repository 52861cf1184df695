/** The golden input of a bundle (the twin of vlmport/runtime/layouts/golden.py). */

import type { Golden } from '../bundle/manifest.js';
import { VlmportError } from '../errors.js';
import type { Rgb } from './images/reading.js';

/** The golden picture's pixels. */
export function goldenImage({ width, height, rgb }: Golden['image']): Rgb {
  const data = Uint8Array.from(atob(rgb), letter => letter.charCodeAt(0));
  if (data.length === width * height * 3) return { width, height, data };
  const message = `golden.image: not ${height}x${width}x3 bytes`;
  throw new VlmportError('BundleError', 'bundle.wrong-golden', message, 'export the bundle again');
}
