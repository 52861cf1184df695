/** A GPU that gives wrong results, or none, is detected, and WebAssembly is used. */

import type { Browser } from 'playwright-core';
import { afterAll, afterEach, beforeAll, expect, test } from 'vitest';
import type * as Vlmport from '../src/index.js';
import type { TestServer } from './server.js';
import { ask, expected, launch, openPage, refusal, startServer, thorough } from './support.js';

let server: TestServer;
let browser: Browser;
beforeAll(async () => {
  server = await startServer();
  browser = await launch({ webgpu: true });
});
afterEach(() => {
  server.fault = () => null;
  server.workerPrelude = '';
});
afterAll(async () => {
  await browser.close();
  await server.stop();
});

const { captions } = expected();
const picture = Object.keys(captions)[0]!;
const options = { threads: 1 };

// The known fault of graphics drivers with subgroups of 4: attention is wrong from 32 rows on.
const WITH_SUBGROUPS = `
  const plain = GPUAdapter.prototype.requestDevice;
  GPUAdapter.prototype.requestDevice = function (wanted) {
    if (!this.features.has('subgroups')) throw new Error('this test needs an adapter with subgroups');
    return plain.call(this, { ...wanted, requiredFeatures: ['subgroups'] });
  };`;

// A driver whose square roots are a tenth too large.
const WRONG_SHADERS = `
  const plain = GPUDevice.prototype.createShaderModule;
  GPUDevice.prototype.createShaderModule = function (wanted) {
    const code = wanted.code.replaceAll(/\\b(inverseSqrt|sqrt)\\(/g, '1.1 * $1(');
    return plain.call(this, { ...wanted, code });
  };`;

const BROKEN_SHADERS = `
  const plain = GPUDevice.prototype.createShaderModule;
  GPUDevice.prototype.createShaderModule = function (wanted) {
    return plain.call(this, { ...wanted, code: 'no shader' });
  };`;

const NO_DEVICE = `
  GPUAdapter.prototype.requestDevice = () => Promise.reject(new Error('the driver crashed'));`;

// The device is lost when the first image is read.
const LOST_LATER = `
  const plain = GPUAdapter.prototype.requestDevice, read = createImageBitmap;
  GPUAdapter.prototype.requestDevice = async function (wanted) {
    const device = await plain.call(this, wanted);
    globalThis.createImageBitmap = (...picture) => (device.destroy(), read(...picture));
    return device;
  };`;

// The device is lost during an answer.
const LOST_WHILE_WRITING = `
  const plain = GPUAdapter.prototype.requestDevice, post = self.postMessage.bind(self);
  let device = null, pieces = 0;
  GPUAdapter.prototype.requestDevice = async function (wanted) {
    return (device = await plain.call(this, wanted));
  };
  self.postMessage = (message, ...more) => {
    if (message.type === 'piece' && ++pieces === 2) device.destroy();
    post(message, ...more);
  };`;

const NO_FLOAT16 = `
  const has = GPUSupportedFeatures.prototype.has;
  GPUSupportedFeatures.prototype.has = function (name) {
    return name !== 'shader-f16' && has.call(this, name);
  };`;

const NO_WEBGPU = `Object.defineProperty(navigator, 'gpu', { value: undefined });`;

type Fault = readonly [name: string, prelude: string, reason: RegExp];
const FAULTS: readonly Fault[] = [
  ['subgroups of 4', WITH_SUBGROUPS, /gives other results than .*: the first logits differ/],
  ['broken shaders', BROKEN_SHADERS, /WebGPU is not used/],
  ['no device', NO_DEVICE, /no GPU that works \(the driver crashed\)/],
  ['no WebGPU', NO_WEBGPU, /this browser has no WebGPU/],
];

/** Only `make verify-all` runs this one. */
const REST: readonly Fault[] = [['wrong shaders', WRONG_SHADERS, /gives other results than /]];

test.each(thorough ? REST : FAULTS)(
  '%s: WebAssembly takes over, with a reason',
  async (_, prelude, reason) => {
    server.workerPrelude = prelude;
    const page = await openPage(browser, server.url);
    const answer = await ask(page, { options, pictures: [`/pictures/${picture}`] });
    expect(answer.device).toBe('wasm');
    expect(answer.reason).toMatch(reason);
    expect(answer.tokens).toEqual([captions[picture]![answer.precision]!.tokens]);
    await page.context().close();
  },
);

test.each([
  ['broken shaders', BROKEN_SHADERS],
  ['no WebGPU', NO_WEBGPU],
])("%s: device 'webgpu' is refused", async (_, prelude) => {
  server.workerPrelude = prelude;
  const page = await openPage(browser, server.url);
  const refused = await refusal(page, { options: { ...options, device: 'webgpu' } });
  expect(refused.kind).toBe('DeviceError');
  expect(refused.hint).toMatch(/wasm|another/);
  await page.context().close();
});

test('a GPU that is lost while it runs is replaced by WebAssembly', async () => {
  server.workerPrelude = LOST_LATER;
  const page = await openPage(browser, server.url);
  const found = await page.evaluate(async url => {
    const { VLM } = (globalThis as unknown as { vlmport: typeof Vlmport }).vlmport;
    const vlm = await VLM.load('/bundle/', { threads: 1 });
    const before = vlm.device;
    const { tokenIds } = await vlm.caption(url);
    const { device, precision, reason } = vlm;
    vlm.dispose();
    return { before, device, precision, reason, tokenIds };
  }, `/pictures/${picture}`);
  expect(found).toMatchObject({ before: 'webgpu', device: 'wasm' });
  expect(found.reason).toMatch(/^WebGPU failed while it ran: /);
  expect(found.tokenIds).toEqual(captions[picture]![found.precision]!.tokens);
  await page.context().close();
});

test('an abort works while WebAssembly takes over, and so does the next caption', async () => {
  const nothingKept = "Object.defineProperty(globalThis, 'caches', { value: undefined });";
  server.workerPrelude = LOST_LATER + nothingKept;
  const page = await openPage(browser, server.url);
  const asked = (name: string) => server.askedFor(name).length;
  const asking = page.evaluate(async url => {
    const { VLM } = (globalThis as unknown as { vlmport: typeof Vlmport }).vlmport;
    const vlm = await VLM.load('/bundle/', { threads: 1 });
    const controller = new AbortController();
    const { signal } = controller;
    Object.assign(globalThis, { loaded: true, giveUp: () => controller.abort('enough') });
    await new Promise(resolve => Object.assign(globalThis, { go: resolve }));
    const first: unknown = await vlm.caption(url, { signal }).catch((reason: unknown) => reason);
    Object.assign(globalThis, { heard: true });
    await new Promise(resolve => Object.assign(globalThis, { go: resolve }));
    const { tokenIds } = await vlm.caption(url);
    const { device, precision } = vlm;
    vlm.dispose();
    return { first, device, precision, tokenIds };
  }, `/pictures/${picture}`);
  await page.waitForFunction(() => 'loaded' in globalThis);
  const call = (name: string) =>
    page.evaluate(name => (globalThis as unknown as Record<string, () => void>)[name]!(), name);
  const before = asked('.onnx');
  server.fault = ({ path }) => (path.endsWith('.onnx') ? { hangAfter: 1000 } : null);
  await call('go');
  await expect.poll(() => asked('.onnx'), { timeout: 60_000 }).toBeGreaterThan(before);
  await call('giveUp');
  await page.waitForFunction(() => 'heard' in globalThis, undefined, { timeout: 20_000 });
  server.fault = () => null;
  await call('go');
  const { first, ...found } = await asking;
  expect(first).toBe('enough');
  const { precision } = found;
  expect(found).toEqual({
    device: 'wasm',
    precision,
    tokenIds: captions[picture]![precision]!.tokens,
  });
  await page.context().close();
});

test('a GPU that is lost during an answer gives an error, and then WebAssembly is used', async () => {
  server.workerPrelude = LOST_WHILE_WRITING;
  const page = await openPage(browser, server.url);
  const found = await page.evaluate(async url => {
    const { VLM, VlmportError } = (globalThis as unknown as { vlmport: typeof Vlmport }).vlmport;
    const vlm = await VLM.load('/bundle/', { threads: 1 });
    const before = vlm.device;
    const error: unknown = await vlm.caption(url).catch((thrown: unknown) => thrown);
    const { kind, hint } = error instanceof VlmportError ? error : { kind: 'none', hint: '' };
    const { tokenIds } = await vlm.caption(url);
    const { device, precision, reason } = vlm;
    vlm.dispose();
    return { before, kind, hint, device, precision, reason, tokenIds };
  }, `/pictures/${picture}`);
  expect(found).toMatchObject({ before: 'webgpu', kind: 'DeviceError', device: 'wasm' });
  expect(found.hint).toMatch(/try again.*WebAssembly/);
  expect(found.reason).toMatch(/^WebGPU failed while it ran: /);
  expect(found.tokenIds).toEqual(captions[picture]![found.precision]!.tokens);
  await page.context().close();
});

test('a GPU without 16-bit shaders', async () => {
  server.workerPrelude = NO_FLOAT16;
  const page = await openPage(browser, server.url);
  const half = { ...options, precision: 'q4f16' };
  const refused = await refusal(page, { options: { ...half, device: 'webgpu' } });
  expect(refused).toMatchObject({
    kind: 'DeviceError',
    code: 'device.wrong-precision',
    message: expect.stringMatching(/q4f16.* 16-bit/),
  });
  expect(refused.hint).toMatch(/precision: 'auto'/);
  // This build's WebAssembly has no kernel for its embeddings either, so it can't take over.
  expect(await refusal(page, { options: half })).toMatchObject({
    kind: 'DeviceError',
    code: 'device.wrong-precision',
    message: expect.stringMatching(
      /^embed_tokens .*wasm.* GatherBlockQuantized .*WebGPU is not used: .*q4f16.* 16-bit/,
    ),
    hint: expect.stringMatching(/precision: 'auto'/),
  });
  const fp16 = await ask(page, { options: { ...options, precision: 'fp16' } });
  expect(fp16).toMatchObject({ device: 'wasm', precision: 'fp16' });
  expect(fp16.reason).toMatch(/^WebGPU is not used: the GPU can't compute fp16/);
  await page.context().close();
});

test.runIf(thorough)('a GPU without 16-bit shaders runs what the bundle chooses', async () => {
  server.workerPrelude = NO_FLOAT16;
  const page = await openPage(browser, server.url);
  expect(await ask(page, { options })).toMatchObject({ device: 'webgpu', reason: null });
  await page.context().close();
});

test('a bundle whose golden is wrong is refused on WebAssembly too', async () => {
  const manifest = await (await fetch(`${server.url}bundle/vlmport.json`)).json();
  for (const one of Object.values<{ logits: number[] }>(manifest.golden.expected))
    one.logits[3]! += 1;
  const page = await openPage(browser, server.url);
  await page.context().route('**/vlmport.json', route => route.fulfill({ json: manifest }));
  const options = { device: 'wasm', precision: 'fp32' } as const;
  const refused = await refusal(page, { options });
  expect(refused.kind).toBe('DeviceError');
  expect(refused.message).toMatch(
    /wasm gives other results than .*: the first logits differ by (1|0\.99)/,
  );
});
