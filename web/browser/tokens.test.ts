/** The same tokens as Python, on each device and in each precision. */

import type { Browser, Page } from 'playwright-core';
import { afterAll, beforeAll, expect, test } from 'vitest';
import type * as Vlmport from '../src/index.js';
import type { TestServer } from './server.js';
import { type Asking, ask, expected, launch, openPage, startServer, thorough } from './support.js';

const { captions, precisions } = expected();
const pictures = Object.keys(captions);

let server: TestServer;
let browser: Browser;
let page: Page; // one for all: from the second row on ONNX Runtime loads faster
beforeAll(async () => {
  server = await startServer();
  browser = await launch({ webgpu: true });
  page = await openPage(browser, server.url);
});
afterAll(async () => {
  await browser.close();
  await server.stop();
});

// Images on WebGPU: a GPU in software is slow.
const SLOW = thorough ? pictures.length : 2;

/** The `auto` precisions of the bundles on these devices, and fp32: exactly the same tokens. */
const SAME = [
  { device: 'wasm', precision: 'fp32', threads: 1 },
  { device: 'wasm', precision: 'fp32', threads: 2 },
  { device: 'wasm', precision: 'q8', threads: 1 },
  { device: 'wasm', precision: 'q8', threads: 2 },
  { device: 'webgpu', precision: 'fp32', threads: 1 },
  { device: 'webgpu', precision: 'q4', threads: 1 },
] as const;

/**
 * These round in other places than a CPU: 4-bit kernels on WebAssembly keep the activations in 32
 * bits, 16-bit ones widen some operators. The result of a near tie may differ.
 */
const ALIKE = ['fp16', 'q4', 'q4f16'].filter(name => precisions.includes(name));

async function captionsOf(options: Asking['options'] & object, names: readonly string[]) {
  const answer = await ask(page, { options, pictures: names.map(name => `/pictures/${name}`) });
  expect(answer).toMatchObject({ ...options, reason: null });
  expect(answer.streamed).toEqual(answer.texts);
  return answer;
}

test.each(thorough ? SAME.filter(one => one.device === 'webgpu') : SAME)(
  '$precision on $device, $threads threads: the same tokens',
  async options => {
    const some = options.device === 'wasm' ? pictures : pictures.slice(0, SLOW);
    const answer = await captionsOf(options, some);
    const wanted = some.map(name => captions[name]![options.precision]!);
    expect(answer.tokens).toEqual(wanted.map(one => one.tokens));
    expect(answer.texts).toEqual(wanted.map(one => one.text));
  },
);

test.runIf(!thorough).each(ALIKE)('%s on wasm: the same captions except one', async precision => {
  const { texts } = await captionsOf({ device: 'wasm', precision, threads: 1 }, pictures);
  const same = pictures.filter((name, i) => captions[name]![precision]!.text === texts[i]);
  expect(same.length).toBeGreaterThanOrEqual(pictures.length - 1);
});

test.runIf(!thorough)(
  'beams and samples on WebGPU: the same tokens as on WebAssembly',
  async () => {
    const url = `/pictures/${pictures[0]!}`;
    const found = await page.evaluate(async url => {
      const { VLM } = (globalThis as unknown as { vlmport: typeof Vlmport }).vlmport;
      const beams = { numBeams: 3, numReturnSequences: 3, maxNewTokens: 6 };
      const samples = { doSample: true, seed: 1, temperature: 2, numReturnSequences: 2 };
      const all = [];
      for (const device of ['wasm', 'webgpu'] as const) {
        const vlm = await VLM.load('/bundle/', { device, precision: 'fp32' });
        for (const options of [beams, { ...samples, maxNewTokens: 6 }]) {
          const caption = await vlm.caption(url, options);
          all.push([caption, ...caption.alternatives].map(one => [...one.tokenIds]));
        }
        vlm.dispose();
      }
      return all;
    }, url);
    expect(found.map(one => one.length)).toEqual([3, 2, 3, 2]);
    expect(found.slice(2)).toEqual(found.slice(0, 2));
  },
);
