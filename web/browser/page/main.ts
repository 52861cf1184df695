/** The package, and of its inside what the tests look at, within reach of the tests. */

import * as vlmport from '@vlmport/web';
import { sha256 } from '../../dist/bundle/sha256.js';
import { openImage } from '../../dist/runtime/images/reading.js';

Object.assign(globalThis, { vlmport, inside: { openImage, sha256 } });
