/**
 * Try a device with the bundle's golden input before it is trusted (the twin of
 * vlmport/runtime/probe.py): the exporter recorded what its graphs give on a CPU.
 */

import type { Golden, GoldenExpectation } from '../bundle/manifest.js';
import { asVlmportError } from '../errors.js';
import { type Components, goldenImage } from './components.js';
import { generate } from './generate.js';

/**
 * What is wrong, in plain words; an empty list means that the device can be trusted.
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
    if (cause.code === 'BundleError') throw cause; // no device is at fault
    return [cause.message];
  }
}

async function compare(
  components: Components,
  golden: Golden,
  expected: GoldenExpectation,
  signal: AbortSignal,
): Promise<string[]> {
  const processed = await components.processImage(goldenImage(golden.image), golden.options);
  const features = await components.encodeImage(processed, signal);
  const copies = Array.from({ length: golden.copies });
  const ids = copies.flatMap(() => processed.promptIds);
  if (ids.length !== golden.prefill_tokens) {
    return [`the prompt has ${ids.length} tokens, recorded were ${golden.prefill_tokens}`];
  }
  const embeds = await components.embedPrompt(
    ids,
    copies.map(() => features),
  );
  const options = { maxNewTokens: expected.tokens.length, stopTokenIds: new Set<number>(), signal };
  let step = 0;
  for await (const { token, scores } of generate(components, embeds, options)) {
    const problem = (step === 0 && logitsProblem(scores, expected)) || null;
    if (problem) return [problem];
    const wanted = expected.tokens[step++]!;
    if (token === wanted) continue;
    // After a near tie the texts may well part.
    if (scores[token]! - (scores[wanted] ?? -Infinity) <= expected.tolerance) return [];
    return [`token ${step} of ${expected.tokens.length} is ${token}, recorded was ${wanted}`];
  }
  return [];
}

function logitsProblem(scores: Float32Array, expected: GoldenExpectation): string | null {
  const errors = expected.logit_ids.map((id, i) =>
    Math.abs((scores[id] ?? NaN) - (expected.logits[i] ?? NaN)),
  );
  const largest = errors.reduce((a, b) => (b <= a ? a : b), 0); // NaN stays
  if (largest <= expected.tolerance) return null;
  const allowed = expected.tolerance.toPrecision(3);
  return `first logits are off by ${largest.toPrecision(3)}, allowed ${allowed}`;
}
