/** What a caption takes on the GPU it gives back. */

import { expect, test } from 'vitest';
import type * as Vlmport from '../src/index.js';
import { expected, launch, openPage, startServer } from './support.js';

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

test('no buffer is left behind', async () => {
  const server = await startServer();
  const browser = await launch({ webgpu: true });
  server.workerPrelude = COUNTING;
  const page = await openPage(browser, server.url);
  const counts = await page.evaluate(
    async url => {
      const { VLM } = (globalThis as unknown as { vlmport: typeof Vlmport }).vlmport;
      const vlm = await VLM.load('/bundle/', { device: 'webgpu', precision: 'q4' });
      const channel = new BroadcastChannel('alive');
      const found: number[] = [];
      for (let i = 0; i < 6; i++) {
        await vlm.caption(url, { maxNewTokens: 2 + i });
        const answer = new Promise<number>(resolve => {
          channel.onmessage = ({ data }: MessageEvent<number>) => resolve(data);
        });
        channel.postMessage('?');
        found.push(await answer);
      }
      vlm.dispose();
      return found;
    },
    `/pictures/${Object.keys(expected().captions)[0]}`,
  );
  // ONNX Runtime keeps a pool of its own, which is full after a few.
  expect(counts[3]).toBeGreaterThan(0);
  expect(counts.slice(3)).toEqual(counts.slice(3).map(() => counts[3]));
  await browser.close();
  await server.stop();
});
