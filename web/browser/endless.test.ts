/** The page stops a chat template that never ends in a real worker, and goes on. */

import type { Browser, Page } from 'playwright-core';
import { afterAll, beforeAll, expect, test } from 'vitest';
import type * as Vlmport from '../src/index.js';
import type { WorkerReply } from '../src/protocol.js';
import type { TestServer } from './server.js';
import { expected, folders, launch, openPage, startServer } from './support.js';

const FOR_EVER = 'for ever?'; // as in tests/web/endless.py
const WAIT = { timeout: 60_000 };
const LIMIT = 10_000; // the limit of web/src/link.ts; the tests move the page's clock
const { system, maxNewTokens, said } = expected().talks.tiles!;
const turn = said.fp32!.alone[0]!;
const stopped = { kind: 'PromptError', code: 'template.too-slow' };

let server: TestServer;
let browser: Browser;
let page: Page;
beforeAll(async () => {
  const { always, asked } = folders.endless();
  server = await startServer({ '/always/': always, '/asked/': asked });
  browser = await launch();
  page = await openPage(browser, server.url);
  await page.clock.install({ time: 0 });
  await page.clock.pauseAt(1000); // from here on only a test moves it
  // The page's own Worker, watched: it records which workers run a template.
  await page.evaluate(() => {
    const busy = new Set<Worker>();
    Object.assign(globalThis, { busy });
    globalThis.Worker = class extends Worker {
      constructor(...given: ConstructorParameters<typeof Worker>) {
        super(...given);
        this.addEventListener('message', ({ data }: MessageEvent<WorkerReply>) => {
          if (data.type !== 'watched') return;
          if (data.doing === 'template') busy.add(this);
          else busy.delete(this);
        });
      }

      override terminate() {
        busy.delete(this);
        super.terminate();
      }
    };
  });
});
afterAll(async () => {
  await browser.close();
  await server.stop();
});

interface Page_ {
  readonly vlmport: typeof Vlmport;
  readonly busy: ReadonlySet<Worker>;
  vlm?: Vlmport.VLM;
  chat: Vlmport.Conversation;
  end: Promise<unknown>;
}

/** Begin a call in the page that ends with an error, and keep the error as plain data. */
const begin = (work: { readonly load: string } | { readonly ask: string }) =>
  page.evaluate(work => {
    const its = globalThis as unknown as Page_;
    const options = { device: 'wasm', precision: 'fp32', threads: 1 } as const;
    const begun =
      'load' in work ? its.vlmport.VLM.load(work.load, options) : its.chat.ask(work.ask);
    its.end = begun.then(
      () => 'no error',
      (error: Vlmport.VlmportError) => error.toPlain(),
    );
  }, work);

const end = () => page.evaluate(() => (globalThis as unknown as Page_).end);

/** Load the model, and ask the question of Python's runtime in a new conversation. */
const answer = () =>
  page.evaluate(
    async ({ question, system, maxNewTokens }) => {
      const its = globalThis as unknown as Page_;
      const options = { device: 'wasm', precision: 'fp32', threads: 1 } as const;
      its.vlm?.dispose();
      its.vlm = await its.vlmport.VLM.load('/asked/', options);
      its.chat = its.vlm.conversation({ system });
      return [...(await its.chat.ask(question, { maxNewTokens })).tokenIds];
    },
    { question: turn.question!, system: system!, maxNewTokens: maxNewTokens! },
  );

/** Check that the worker hangs in the template until the limit, and that the page does not. */
async function stoppedByThePage() {
  const state = () =>
    page.evaluate(async () => {
      const { busy, end } = globalThis as unknown as Page_;
      const ended = await Promise.race([end, 'not ended']);
      return { busy: busy.size, ended };
    });
  await expect.poll(state, WAIT).toEqual({ busy: 1, ended: 'not ended' });
  await page.clock.fastForward(LIMIT - 1);
  expect(await state()).toEqual({ busy: 1, ended: 'not ended' }); // the page itself responds
  expect(page.workers()).toHaveLength(1);
  await page.clock.fastForward(1);
  expect(await end()).toMatchObject(stopped);
  await expect.poll(() => page.workers(), WAIT).toHaveLength(0);
}

test('a template that never ends ends the load, and another model opens', async () => {
  await begin({ load: '/always/' });
  await stoppedByThePage();
  expect(await answer()).toEqual(turn.tokens);
});

test('one that never ends for one message ends the model, which opens again', async () => {
  expect(await answer()).toEqual(turn.tokens);
  await begin({ ask: FOR_EVER });
  await stoppedByThePage();
  await begin({ ask: turn.question! });
  expect(await end()).toMatchObject(stopped);
  expect(await answer()).toEqual(turn.tokens);
});
