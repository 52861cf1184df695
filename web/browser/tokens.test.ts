/** The same tokens as Python, on each device and in each precision. */

import type { Browser } from 'playwright-core';
import { afterAll, beforeAll, expect, test } from 'vitest';
import type { TestServer } from './server.js';
import { ask, expected, launch, openPage, startServer } from './support.js';

const { captions, precisions } = expected();
const pictures = Object.keys(captions);

let server: TestServer;
let browser: Browser;
beforeAll(async () => {
  server = await startServer();
  browser = await launch({ webgpu: true });
});
afterAll(async () => {
  await browser.close();
  await server.stop();
});

const SLOW = 4; // pictures on WebGPU: a GPU in software takes its time
const CASES = precisions.flatMap(precision => [
  ...([1, 2] as const).map(threads => ({ device: 'wasm' as const, precision, threads })),
  // Chromium's software adapter has no 16-bit shaders.
  ...(precision.includes('f') && precision !== 'fp32'
    ? []
    : [{ device: 'webgpu' as const, precision, threads: 1 }]),
]);

test.each(CASES)('$precision on $device, $threads threads', async options => {
  const page = await openPage(browser, server.url);
  const some = options.device === 'wasm' ? pictures : pictures.slice(0, SLOW);
  const answer = await ask(page, { options, pictures: some.map(name => `/pictures/${name}`) });
  expect(answer).toMatchObject({ ...options, reason: null });
  const wanted = some.map(name => captions[name]![options.precision]!);
  expect(answer.tokens).toEqual(wanted.map(one => one.tokens));
  expect(answer.texts).toEqual(wanted.map(one => one.text));
  expect(answer.streamed).toEqual(wanted.map(one => one.text));
  await page.context().close();
});
