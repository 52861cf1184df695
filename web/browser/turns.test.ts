/** Conversations have Python's tokens turn by turn, and run only the new tokens and images. */

import type { Browser, Page } from 'playwright-core';
import { afterAll, beforeAll, expect, test } from 'vitest';
import type * as Vlmport from '../src/index.js';
import type { TestServer } from './server.js';
import {
  type CountedPage,
  type Told,
  expected,
  launch,
  openCounted,
  startServer,
  talkers,
  thorough,
} from './support.js';

const { talks } = expected();

let server: TestServer;
let browser: Browser;
let page: Page; // one for all: from the second row on ONNX Runtime loads faster
beforeAll(async () => {
  server = await startServer(talkers());
  browser = await launch({ webgpu: true });
  page = await openCounted(browser, server);
});
afterAll(async () => {
  await browser.close();
  await server.stop();
});

interface Form {
  readonly model: string;
  readonly device: 'wasm' | 'webgpu';
  readonly precision: string;
  readonly turns: number;
}

/**
 * Four turns of random models, three of trained ones. Only the latter run at q4: a CPU rounds the
 * inputs of these kernels to 8 bits and a GPU does not, and a model without training has many near
 * ties, whose results then differ. On WebGPU a family has one row, because a GPU in software
 * compiles a model's shaders for twenty seconds.
 */
const FORMS: readonly Form[] = [
  { model: 'tiles', device: 'wasm', precision: 'fp32', turns: 4 },
  { model: 'tiles', device: 'wasm', precision: 'q8', turns: 4 },
  { model: 'tiles', device: 'webgpu', precision: 'fp32', turns: 4 },
  { model: 'windows', device: 'wasm', precision: 'fp32', turns: 4 },
  { model: 'windows', device: 'wasm', precision: 'q8', turns: 4 },
  { model: 'windows', device: 'webgpu', precision: 'fp32', turns: 4 },
  { model: 'lanes', device: 'wasm', precision: 'fp32', turns: 4 },
  { model: 'lanes', device: 'wasm', precision: 'q8', turns: 4 },
  { model: 'lanes', device: 'webgpu', precision: 'fp32', turns: 4 },
  { model: 'shapes-smolvlm', device: 'wasm', precision: 'fp32', turns: 3 },
  { model: 'shapes-smolvlm', device: 'wasm', precision: 'q8', turns: 3 },
  { model: 'shapes-qwen2.5-vl', device: 'wasm', precision: 'fp32', turns: 3 },
  { model: 'shapes-qwen3-vl', device: 'wasm', precision: 'q8', turns: 3 },
];

/** Only `make verify-all` runs these. */
const REST: readonly Form[] = [
  { model: 'shapes-smolvlm', device: 'webgpu', precision: 'q4', turns: 3 },
  { model: 'shapes-qwen3-vl', device: 'webgpu', precision: 'fp32', turns: 3 },
  { model: 'shapes-qwen2.5-vl', device: 'webgpu', precision: 'q4', turns: 3 },
];

/** Runs of the vision encoder in each turn: the second needs none, and one image comes twice. */
const ENCODED: Readonly<Record<string, readonly number[]>> = {
  tiles: [7, 0, 4, 10], // 2 x 3 tiles and the whole, …
  windows: [1, 0, 1, 1],
  lanes: [1, 0, 1, 1],
};

type Asked = Vlmport.GenerateOptions & { readonly messages: Vlmport.Message[] };
interface Turn {
  readonly question: string | null;
  readonly images: readonly string[];
}

const plain = ({ tokens, text, counts }: Told) => ({ tokens, text, counts });

test.each(thorough ? REST : FORMS)(
  '$model, $precision on $device',
  async ({ model, device, precision, turns }) => {
    const { folder, said, system, maxNewTokens } = talks[model]!;
    const urls = (names: readonly string[]) => names.map(name => `/${folder}/${name}`);
    const { alone, messages, ...wanted } = said[precision]!;
    const script = wanted.turns.slice(0, turns);
    const found = await page.evaluate(
      async text => {
        const { vlmport, forgetRuns } = globalThis as unknown as CountedPage;
        const { url, options, system, limit, scripts, asked } = JSON.parse(text) as {
          url: string;
          options: Vlmport.VlmOptions;
          system: string | null;
          limit: Vlmport.AnswerOptions;
          scripts: Turn[][];
          asked: Asked;
        };
        const vlm = await vlmport.VLM.load(url, options);
        const chat = vlm.conversation(system === null ? {} : { system });
        const told = [];
        for (const script of scripts) {
          chat.reset();
          for (const { question, images } of script) {
            await forgetRuns();
            const pieces = chat.stream(question ?? undefined, { images, ...limit });
            let streamed = '';
            let next = await pieces.next();
            for (; !next.done; next = await pieces.next()) streamed += next.value;
            const { tokenIds, text, counts } = next.value;
            const runs = await forgetRuns();
            const encoded = runs.filter(fed => 'pixel_values' in fed).length;
            const fed = runs.flatMap(fed => fed.inputs_embeds?.[1] ?? []);
            told.push({ tokens: [...tokenIds], text, counts, streamed, encoded, fed });
          }
        }
        const { messages, ...others } = asked;
        const { tokenIds, text: answer, counts } = await vlm.generate(messages, others);
        const direct = { tokens: [...tokenIds], text: answer, counts };
        const { device, reason } = vlm;
        vlm.dispose();
        return { told, direct, device, reason };
      },
      JSON.stringify({
        url: `/${model}/`,
        options: { device, precision },
        system,
        limit: maxNewTokens === null ? {} : { maxNewTokens },
        scripts: [script, alone].map(turns =>
          turns.map(({ question, pictures }) => ({ question, images: urls(pictures) })),
        ),
        asked: {
          messages: messages.messages,
          images: urls(messages.pictures),
          imageOptions: messages.imageOptions,
          skipSpecialTokens: false,
          ...(maxNewTokens !== null && { maxNewTokens }),
        },
      }),
    );
    expect(found).toMatchObject({ device, reason: null });
    expect(found.told.map(plain)).toEqual([...script, ...alone].map(plain));
    expect(found.direct).toEqual(plain(messages));
    for (const { text, streamed, counts, fed } of found.told) {
      expect(streamed).toBe(text);
      const prefilled = counts.promptTokens - counts.cachedTokens;
      expect(fed).toEqual([prefilled, ...Array<number>(counts.newTokens - 1).fill(1)]);
    }
    const encoded = found.told.map(one => one.encoded);
    const wantedRuns = ENCODED[model] ?? [encoded[0]!, 0, encoded[0]!];
    expect(encoded).toEqual([...wantedRuns.slice(0, turns), ...alone.map(() => 0)]);
    expect(encoded[0]).toBeGreaterThan(0);
    expect(script[1]!.counts.cachedTokens).toBeGreaterThanOrEqual(script[0]!.counts.promptTokens);
  },
);
