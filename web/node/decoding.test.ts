/**
 * The same answers as Python under many decoding options: the worker's side of the package, run by
 * Node with ONNX Runtime's WebAssembly (tests/web/test_decoding.py gives the bundles).
 */

import { readFileSync } from 'node:fs';
import { afterAll, beforeAll, expect, test, vi } from 'vitest';
import { TestServer } from '../browser/server.js';
import type { Message } from '../src/bundle/manifest.js';
import { decodingOptions } from '../src/options.js';
import type { AnswerData, GeneratedResponse, Question } from '../src/protocol.js';
import { camelCase } from '../src/runtime/decoding/foreign-options.js';
import { Engine } from '../src/runtime/engine.js';
import { Components } from '../src/runtime/graphs/components.js';

interface Case {
  readonly model: string;
  readonly precision: string;
  readonly image: string;
  readonly options: Readonly<Record<string, unknown>>;
  readonly messages: readonly Message[];
  readonly answers: readonly Omit<AnswerData, 'complete'>[];
}

interface Expected {
  readonly images: Readonly<Record<string, { width: number; height: number; data: string }>>;
  readonly cases: readonly Case[];
}

const expected = JSON.parse(readFileSync(process.env.VLMPORT_WEB_EXPECTED!, 'utf8')) as Expected;
const models = JSON.parse(process.env.VLMPORT_WEB_MODELS!) as Record<string, string>;
// Largest difference of a log-probability: kernels of WebAssembly round at other places than native
// ones, those of quantized graphs by far more.
const CLOSE = { exact: 1e-4, quantized: 0.05 };

vi.stubGlobal('location', new URL('http://127.0.0.1/')); // of the page

let server: TestServer;
const engines = new Map<string, Promise<Engine>>();
beforeAll(async () => {
  const roots = Object.entries(models).map(([name, folder]) => [`/${name}/`, folder]);
  server = await TestServer.start(Object.fromEntries(roots) as Record<string, string>);
});
afterAll(() => server.stop());

function engineOf({ model, precision }: Case): Promise<Engine> {
  const key = `${model} ${precision}`;
  const url = `${server.url}${model}/`;
  const rest = { threads: 1, wasmPaths: null, imageCacheBytes: null };
  const load = () =>
    Engine.open(
      { url, device: 'wasm', precision, ...rest },
      () => {},
      new AbortController().signal,
    );
  const engine = engines.get(key) ?? load();
  engines.set(key, engine);
  return engine;
}

async function answer(
  one: Case,
  more: Partial<Question> = {},
): Promise<{ pieces: string[]; response: GeneratedResponse }> {
  const engine = await engineOf(one);
  const { width, height, data } = expected.images[one.image]!;
  const pixels = Uint8Array.from(Buffer.from(data, 'base64'));
  const image = { kind: 'pixels', width, height, channels: 3, data: pixels } as const;
  const given = Object.entries(one.options).map(([name, value]) => [camelCase(name), value]);
  const pieces: string[] = [];
  const response = await engine.generate(
    {
      messages: one.messages,
      images: [{ number: 0, image, options: {} }],
      imageOptions: {},
      options: decodingOptions(engine.info, Object.fromEntries(given)),
      leavesRoom: false,
      alone: null,
      conversation: null,
      ...more,
    },
    { onPiece: piece => pieces.push(piece), onChange: () => {} },
    new AbortController().signal,
  );
  return { pieces, response };
}

const named = (one: Case) => `${one.model} ${one.precision} ${JSON.stringify(one.options)}`;

test.each(expected.cases.map(one => [named(one), one] as const))('%s', async (_, one) => {
  const { pieces, response } = await answer(one);
  const { caption } = response;
  const found = [caption, ...caption.alternatives];
  const plain = (answers: readonly Omit<AnswerData, 'complete'>[]) =>
    answers.map(({ text, tokenIds, stopReason }) => ({ text, tokenIds, stopReason }));
  expect(plain(found)).toEqual(plain(one.answers));
  if (found.length === 1 && caption.score === null) expect(pieces.join('')).toBe(caption.text);
  else expect(pieces).toEqual([]);
  expect(caption.seed).toBe(one.options.seed ?? null);
  const close = one.precision === 'fp32' ? CLOSE.exact : CLOSE.quantized;
  const penalty = (one.options.length_penalty ?? 1) as number;
  one.answers.forEach(({ score, logprobs, tokenIds }, i) => {
    const sum = close * tokenIds.length ** (1 - penalty); // a score is a sum over a power of the length
    if (score === null) expect(found[i]!.score).toBeNull();
    else expect(Math.abs(found[i]!.score! - score)).toBeLessThan(sum);
    expect(found[i]!.logprobs?.length).toBe(logprobs?.length);
    logprobs?.forEach((wanted, place) => {
      const report = found[i]!.logprobs![place]!;
      expect(report.token).toBe(wanted.token);
      expect(Math.abs(report.logprob - wanted.logprob)).toBeLessThan(close);
      expect(report.top.map(([token]) => token)).toEqual(wanted.top.map(([token]) => token));
    });
  });
});

test.each(['fp32', 'q8'])(
  '%s: a turn after beams computes only its own tokens',
  async precision => {
    const beams = expected.cases.find(
      one => one.model !== 'shapes' && one.precision === precision && one.options.num_beams === 3,
    )!;
    const { response: first } = await answer(beams, { conversation: 7 });
    const said: Message[] = [
      ...beams.messages,
      { role: 'assistant', content: [{ type: 'text', text: first.history }] },
      { role: 'user', content: [{ type: 'text', text: 'how many shapes are there?' }] },
    ];
    const greedy = { ...beams, options: { max_new_tokens: 8 } };
    const { response: second } = await answer(greedy, { messages: said, conversation: 7 });
    const { response: fresh } = await answer(greedy, { messages: said });
    expect(second.caption.tokenIds).toEqual(fresh.caption.tokenIds);
    expect(second.caption.counts.cachedTokens).toBe(first.caption.counts.promptTokens);
    expect(fresh.caption.counts.cachedTokens).toBe(0);
  },
);

test('drafts of a text that repeats itself save calls of the decoder', async () => {
  const drafted = expected.cases.find(
    one => one.precision === 'fp32' && 'prompt_lookup_num_tokens' in one.options,
  )!;
  const engine = await engineOf(drafted);
  const decode = vi.spyOn(Components.prototype, 'decode');
  await answer(drafted);
  const calls = decode.mock.calls.length;
  decode.mockClear();
  await answer({ ...drafted, options: { ...drafted.options, prompt_lookup_num_tokens: null } });
  expect(calls).toBeLessThan(decode.mock.calls.length / 2);
  decode.mockRestore();
  expect(engine.info.notes.join()).not.toContain('left out');
});

test('drafts are refused where they could change a text', async () => {
  const one = expected.cases.find(one => one.precision === 'q8')!;
  const drafted = { ...one, options: { prompt_lookup_num_tokens: 5 } };
  await expect(answer(drafted)).rejects.toMatchObject({ code: 'option.not-for-this-model' });
});

test('an answer has room for what the options ask for', async () => {
  const [one] = expected.cases;
  const options = [{ max_length: 2 }, { min_new_tokens: 9999 }];
  const codes = options.map(given =>
    answer({ ...one!, options: given }).catch(error => error.code),
  );
  expect(await Promise.all(codes)).toEqual(['option.no-room', 'option.no-room']);
});
