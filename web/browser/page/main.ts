/** The package, within reach of the tests. */

import * as vlmport from '@vlmport/web';

Object.assign(globalThis, { vlmport });
