/** Errors of ONNX Runtime in our words, and errors as plain data. */

import { expect, test } from 'vitest';

import { VlmportError, whyAndHint } from '../src/errors.js';

const FAILED = 'failed to call OrtRun(). ERROR_CODE: 2, ERROR_MESSAGE: Non-zero status code';

test('a graph that refuses its input is quoted with its hint', () => {
  const name = "refused: it's more than 5: see 'x' | take less";
  const message = `${FAILED} returned while running Gather node. Name:'${name}' Status Message: idx`;
  expect(whyAndHint(new Error(message), 'other')).toEqual([
    "it's more than 5: see 'x'",
    'take less',
  ]);
});

test('any other error is its first line', () => {
  const error = new Error("Name:'node_Gather_3' Status Message: idx=9\nmore");
  expect(whyAndHint(error, 'a hint')).toEqual([
    "Name:'node_Gather_3' Status Message: idx=9",
    'a hint',
  ]);
  expect(whyAndHint('text', 'a hint')).toEqual(['text', 'a hint']);
});

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
