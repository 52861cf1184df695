/** The memory of loading, and of captions and conversations on the GPU. */

import { existsSync, readFileSync } from 'node:fs';
import type { Browser } from 'playwright-core';
import { expect, test } from 'vitest';
import type * as Vlmport from '../src/index.js';
import { ask, expected, folders, launch, openPage, startServer } from './support.js';

// Counts the worker's buffers that are alive, and tells when asked.
const COUNTING = `
  let alive = 0;
  const create = GPUDevice.prototype.createBuffer, destroy = GPUBuffer.prototype.destroy;
  const ended = new WeakSet();
  GPUDevice.prototype.createBuffer = function (wanted) {
    alive++;
    return create.call(this, wanted);
  };
  GPUBuffer.prototype.destroy = function () {
    if (!ended.has(this)) alive--;
    ended.add(this);
    return destroy.call(this);
  };
  const channel = new BroadcastChannel('alive');
  channel.onmessage = () => channel.postMessage(alive);`;

// Counts the bytes that are read back from the GPU, and tells when asked.
const READING = `
  let bytes = 0;
  const map = GPUBuffer.prototype.mapAsync;
  GPUBuffer.prototype.mapAsync = function (mode, ...more) {
    if (mode === GPUMapMode.READ) bytes += this.size;
    return map.call(this, mode, ...more);
  };
  const reading = new BroadcastChannel('bytes');
  reading.onmessage = () => reading.postMessage(bytes);`;

test('a caption frees its buffers, and a step reads back no more than its logits', async () => {
  const server = await startServer();
  const browser = await launch({ webgpu: true });
  server.workerPrelude = `${COUNTING}\n${READING}`;
  const page = await openPage(browser, server.url);
  const picture = Object.keys(expected().captions)[0]!;
  const { alive, bytes } = await page.evaluate(async url => {
    const { VLM } = (globalThis as unknown as { vlmport: typeof Vlmport }).vlmport;
    const vlm = await VLM.load('/bundle/', { device: 'webgpu', precision: 'q4' });
    const asked = (name: string) => {
      const channel = new BroadcastChannel(name);
      return () =>
        new Promise<number>(resolve => {
          channel.onmessage = ({ data }: MessageEvent<number>) => resolve(data);
          channel.postMessage('?');
        });
    };
    const [buffers, read] = [asked('alive'), asked('bytes')];
    const [alive, bytes]: [number[], number[]] = [[], []];
    for (let i = 0; i < 6; i++) {
      vlm.forgetImages(); // so that it is encoded again
      const before = await read();
      await vlm.caption(url, { maxNewTokens: 2 + i });
      bytes.push((await read()) - before);
      alive.push(await buffers());
    }
    vlm.dispose();
    return { alive, bytes };
  }, `/pictures/${picture}`);
  // ONNX Runtime has a pool of its own, which is full after a few captions.
  expect(alive[3]).toBeGreaterThan(0);
  expect(alive.slice(3)).toEqual(alive.slice(3).map(() => alive[3]));
  // The cache stays on the GPU.
  const { dims } = await (await fetch(`${server.url}bundle/vlmport.json`)).json();
  const logits = 4 * dims.vocab_size;
  const [two, five] = [bytes[0]!, bytes[3]!];
  expect(two).toBeGreaterThanOrEqual(2 * logits);
  expect((five - two) / 3).toBeLessThan(logits + 1024);
  const position = 2 * 4 * dims.num_hidden_layers * dims.num_key_value_heads * dims.head_dim;
  expect(position).toBeGreaterThan(1024); // so that reading one position of the cache would show
  await browser.close();
  await server.stop();
});

test('a conversation frees its buffers, also the smaller ones from its beginning', async () => {
  const server = await startServer({ '/tiles/': folders.tiles() });
  const browser = await launch({ webgpu: true });
  server.workerPrelude = COUNTING;
  const page = await openPage(browser, server.url);
  const counts = await page.evaluate(async () => {
    const { VLM } = (globalThis as unknown as { vlmport: typeof Vlmport }).vlmport;
    const vlm = await VLM.load('/tiles/', { device: 'webgpu', precision: 'q4' });
    const channel = new BroadcastChannel('alive');
    const alive = () =>
      new Promise<number>(resolve => {
        channel.onmessage = ({ data }: MessageEvent<number>) => resolve(data);
        channel.postMessage('?');
      });
    const short = { maxNewTokens: 2 };
    const chat = vlm.conversation();
    const found: number[][] = [];
    for (let i = 0; i < 5; i++) {
      await chat.ask('What is it?', short);
      const one = await alive();
      await chat.ask('And where is it?', short); // longer than the first buffers
      const two = await alive();
      chat.reset();
      await vlm.generate([{ role: 'user', content: 'x' }], short); // the worker has the reset
      found.push([one, two, await alive()]);
    }
    vlm.dispose();
    return found;
  });
  const [one, two, none] = counts[3]!;
  expect(counts[4]).toEqual(counts[3]);
  expect(two).toBe(one); // no more of them
  expect(none).toBeLessThan(one!);
  await browser.close();
  await server.stop();
});

async function peakMemory(browser: Browser): Promise<number> {
  const session = await browser.newBrowserCDPSession();
  const { processInfo } = await session.send('SystemInfo.getProcessInfo');
  const peaks = processInfo
    .filter(one => one.type === 'renderer')
    .map(one => /VmHWM:\s+(\d+) kB/.exec(readFileSync(`/proc/${one.id}/status`, 'utf8'))?.[1]);
  return 1024 * Math.max(...peaks.map(Number));
}

/** Measure the peak and the loaded bytes of a first visit, and of one with all files kept. */
async function loadTwice(folder: string): Promise<{ peak: number; bytes: number }[]> {
  const server = await startServer({ '/bundle/': folder });
  const context = await (await launch()).newContext();
  const visits = [];
  for (let i = 0; i < 2; i++) {
    const page = await context.newPage(); // a process of its own
    page.setDefaultTimeout(120_000);
    await page.goto(server.url);
    await page.waitForFunction(() => 'vlmport' in globalThis);
    const options = { device: 'wasm', precision: 'fp32', threads: 1 } as const;
    const { progress } = await ask(page, { options });
    visits.push({ peak: await peakMemory(context.browser()!), bytes: progress.at(-1)!.totalBytes });
    await page.close();
  }
  expect(server.askedFor('.onnx')).toHaveLength(4); // the second visit requested none
  await context.browser()!.close();
  await server.stop();
  return visits;
}

test.runIf(existsSync('/proc/self/status'))('a load peaks below 2.3 × the weights', async () => {
  const { tiny, large } = folders.sizes();
  const [small, big] = [await loadTwice(tiny), await loadTwice(large)];
  const times = big.map(
    ({ peak, bytes }, i) => (peak - small[i]!.peak) / (bytes - small[i]!.bytes),
  );
  console.log(
    `peak over a tiny model's: ${times.map(one => one.toFixed(2)).join(', ')} × the weights`,
  );
  expect(big[0]!.bytes - small[0]!.bytes).toBeGreaterThan(150e6);
  for (const one of times) expect(one).toBeLessThan(2.3);
});
