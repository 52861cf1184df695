/** Errors as plain data. */

import { expect, test } from 'vitest';
import { VlmportError } from '../src/errors.js';

test('an error keeps its kind, hint and code across the worker', () => {
  const coded = new VlmportError('PromptError', 'prompt.unknown-part', 'no', 'yes');
  const { kind, message, hint, code } = VlmportError.from(structuredClone(coded.toPlain()));
  expect({ kind, message, hint, code }).toEqual({
    kind: 'PromptError',
    message: 'no',
    hint: 'yes',
    code: 'prompt.unknown-part',
  });
});
