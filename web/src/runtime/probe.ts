/**
 * Try a device with the bundle's golden input, and compare with the results that the exporter
 * recorded on a CPU (the twin of vlmport/runtime/probe.py).
 */

import type { Golden, GoldenExpectation } from '../bundle/manifest.js';
import { asVlmportError } from '../errors.js';
import { openCache } from './graphs/cache.js';
import type { Components } from './graphs/components.js';
import { DEFAULTS } from './decoding/options.js';
import { newSearch } from './decoding/new-search.js';
import { generate } from './generate.js';
import { goldenImage } from './golden.js';

/**
 * List the differences in plain words; an empty list means that the device gives right results.
 *
 * Throws BundleError for a bundle that no device could run, and the abort.
 */
export async function probe(
  components: Components,
  golden: Golden,
  expected: GoldenExpectation,
  signal: AbortSignal,
): Promise<string[]> {
  try {
    return await compare(components, golden, expected, signal);
  } catch (error) {
    signal.throwIfAborted();
    const cause = asVlmportError(error, 'DeviceError');
    if (cause.kind === 'BundleError') throw cause; // the cause is not the device
    return [cause.message];
  }
}

async function compare(
  components: Components,
  golden: Golden,
  expected: GoldenExpectation,
  signal: AbortSignal,
): Promise<string[]> {
  const image = goldenImage(golden.image);
  const { inputs, promptIds } = await components.processImage(image, golden.options);
  const features = await components.encodeImage(inputs, signal);
  const copies = Array.from({ length: golden.copies });
  const ids = copies.flatMap(() => promptIds);
  if (ids.length !== golden.prefill_tokens) {
    return [`the prompt has ${ids.length} tokens, expected ${golden.prefill_tokens}`];
  }
  const encoded = { features, inputs: components.positionInputs(inputs) };
  const prompt = await components.embedPrompt(
    ids,
    copies.map(() => encoded),
  );
  const maxNewTokens = expected.tokens.length;
  const cache = openCache(components, ids.length + maxNewTokens - 1);
  const search = newSearch(DEFAULTS, {
    promptIds: ids,
    processorsSeePrompt: true,
    stopTokenIds: new Set(),
    maxNewTokens,
    vocabSize: components.manifest.dims.vocab_size,
    isStopped: null,
    mask: null,
  });
  const request = { ...prompt, search, maxNewTokens, promptIds: ids, lookup: null };
  let step = 0;
  try {
    for await (const [scores] of generate(cache, request, signal)) {
      const token = search.results()[0]!.tokens.at(-1)!;
      const problem = (step === 0 && logitsProblem(scores!, expected)) || null;
      if (problem) return [problem];
      const wanted = expected.tokens[step++]!;
      if (token === wanted) continue;
      // After a near tie the texts may differ.
      if (scores![token]! - (scores![wanted] ?? -Infinity) <= expected.tolerance) return [];
      return [`token ${step} of ${maxNewTokens} is ${token}, expected ${wanted}`];
    }
    return [];
  } finally {
    cache.dispose();
  }
}

function logitsProblem(scores: Float32Array, expected: GoldenExpectation): string | null {
  const errors = expected.logit_ids.map((id, i) =>
    Math.abs((scores[id] ?? NaN) - (expected.logits[i] ?? NaN)),
  );
  const largest = errors.reduce((a, b) => (b <= a ? a : b), 0); // NaN stays
  if (largest <= expected.tolerance) return null;
  const allowed = expected.tolerance.toPrecision(3);
  return `the first logits differ by ${largest.toPrecision(3)}, allowed is ${allowed}`;
}
