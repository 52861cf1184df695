/** The browser code in a bundle's model card runs as it is written there, for each family. */

import { readFileSync } from 'node:fs';
import { join } from 'node:path';
import type { Browser, Page } from 'playwright-core';
import { afterAll, beforeAll, expect, test } from 'vitest';
import type { TestServer } from './server.js';
import { folders, launch, openPage, startServer, talkers } from './support.js';

const PICTURE = '/pictures/red_square.png';
const SAID = /^a red square on a white background\.?$/i;
const IMPORT = "import { VLM } from '@vlmport/web';";
const PLACE = 'https://example.org/MODEL/';
// The trained ones, and one that cuts pictures into tiles.
const models: Record<string, string> = { bundle: folders.bundle(), ...folders.talkers() };
const names = Object.keys(models).filter(name => !['windows', 'lanes'].includes(name));

let server: TestServer;
let browser: Browser;
let page: Page;
beforeAll(async () => {
  server = await startServer(talkers());
  browser = await launch();
  page = await openPage(browser, server.url);
});
afterAll(async () => {
  await browser.close();
  await server.stop();
});

test.each(names)('%s', async name => {
  const card = readFileSync(join(models[name]!, 'README.md'), 'utf8');
  const blocks = [...card.matchAll(/```js\n(.*?)```/gs)].map(([, code]) => code!);
  const [code, ...others] = blocks.filter(block => block.includes(IMPORT));
  expect(others).toEqual([]);
  expect(code).toContain(PLACE);
  const body = `const { VLM } = globalThis.vlmport;\n${code!
    .replace(IMPORT, '')
    .replace(PLACE, `${server.url}${name}/`)}\nmodel.dispose();`;
  const said = await page.evaluate(
    async ({ body, url }) => {
      const file = new File([await (await fetch(url)).blob()], 'photo.png');
      const lines: string[] = [];
      const console = { log: (text: string) => lines.push(text) };
      const run = new Function('file', 'console', `return (async () => {${body}})();`);
      await (run as (file: File, out: typeof console) => Promise<void>)(file, console);
      return lines;
    },
    { body, url: PICTURE },
  );
  expect(said).toHaveLength(1);
  if (name !== 'tiles') expect(said[0]!.trim()).toMatch(SAID);
});
