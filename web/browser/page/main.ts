/** Make the package, and the internal functions that the tests use, globals of the page. */

import * as vlmport from '@vlmport/web';
import { sha256 } from '../../dist/bundle/sha256.js';
import { openImage } from '../../dist/runtime/images/reading.js';

Object.assign(globalThis, { vlmport, inside: { openImage, sha256 } });
