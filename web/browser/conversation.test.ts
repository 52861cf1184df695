/** Conversations: the answers that Python has, for the work of what is new. */

import type { Browser, Page } from 'playwright-core';
import { afterAll, beforeAll, expect, test } from 'vitest';
import type * as Vlmport from '../src/index.js';
import type { Fed } from './page/counted.js';
import type { TestServer } from './server.js';
import { type Told, type Turn, expected, folders, launch, openPage, startServer } from './support.js';

interface Page_ {
  readonly vlmport: typeof Vlmport;
  readonly runs: Fed[];
}

const { said, system, maxNewTokens } = expected().talks;
const turns: readonly Turn[] = said.fp32!.turns;

let server: TestServer;
let browser: Browser;
beforeAll(async () => {
  server = await startServer({ '/tiles/': folders.tiles() });
  server.workerPrelude =
    "globalThis.onRun = fed => (globalThis.channel ??= new BroadcastChannel('runs')).postMessage(fed)";
  browser = await launch({ webgpu: true });
});
afterAll(async () => {
  await browser.close();
  await server.stop();
});

/** A page in which `runs` fills with what ONNX Runtime is fed. */
async function open(): Promise<Page> {
  const page = await openPage(browser, server.url);
  await page.evaluate(() => {
    const runs: Fed[] = [];
    new BroadcastChannel('runs').onmessage = ({ data }: MessageEvent<Fed>) => runs.push(data);
    Object.assign(globalThis, { runs });
  });
  return page;
}

interface Talk {
  readonly options: Vlmport.VlmOptions;
  readonly turns: readonly Turn[];
  readonly system: string;
  readonly maxNewTokens: number | null;
}

interface Work {
  /** Runs of the vision encoder. */
  readonly encoded: number;
  /** Tokens that the decoder was fed, run by run. */
  readonly fed: readonly number[];
}

/** A conversation in the page, streamed, with the work of each turn. */
function talk(page: Page, asking: Talk): Promise<(Told & { streamed: string; work: Work })[]> {
  return page.evaluate(async ({ options, turns, system, maxNewTokens }) => {
    const { vlmport, runs } = globalThis as unknown as Page_;
    const vlm = await vlmport.VLM.load('/tiles/', options);
    const chat = vlm.conversation({ system });
    const said = [];
    const heard = () => new Promise(resolve => setTimeout(resolve, 50)); // the last of the runs
    for (const { question, pictures } of turns) {
      await heard();
      runs.length = 0;
      const images = pictures.map(name => `/kinds/${name}`);
      const pieces = chat.stream(question ?? undefined, {
        images,
        ...(maxNewTokens === null ? {} : { maxNewTokens }),
      });
      let streamed = '';
      let next = await pieces.next();
      for (; !next.done; next = await pieces.next()) streamed += next.value;
      const { tokenIds, text, counts } = next.value;
      await heard();
      const work = {
        encoded: runs.filter(fed => 'pixel_values' in fed).length,
        fed: runs.flatMap(fed => fed.inputs_embeds?.[1] ?? []),
      };
      said.push({ tokens: [...tokenIds], text, counts, streamed, work });
    }
    if (vlm.device !== options.device) throw new Error(`${vlm.device}: ${vlm.reason}`);
    vlm.dispose();
    return said;
  }, asking);
}

const FORMS = [
  { device: 'wasm', precision: 'fp32' },
  { device: 'wasm', precision: 'q8' },
  { device: 'webgpu', precision: 'fp32' },
  { device: 'webgpu', precision: 'q4' },
] as const;

test.each(FORMS)('turns, $precision on $device: tokens and work of Python', async options => {
  const page = await open();
  const found = await talk(page, { options, turns, system, maxNewTokens });
  const wanted = said[options.precision]!.turns;
  expect(found.map(({ tokens, text, counts }) => ({ tokens, text, counts }))).toEqual(
    wanted.map(({ tokens, text, counts }) => ({ tokens, text, counts })),
  );
  expect(found.map(one => one.streamed)).toEqual(found.map(one => one.text));
  for (const { counts, work } of found) {
    expect(work.fed).toEqual([
      counts.promptTokens - counts.cachedTokens,
      ...Array(counts.newTokens - 1).fill(1),
    ]);
  }
  // Tile by tile: 2 x 3 and the whole; the second question costs none, rgb.png is known at last.
  expect(found.map(one => one.work.encoded)).toEqual([7, 0, 4, 10]);
  await page.context().close();
});
