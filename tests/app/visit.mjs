// Use the page of `vlmport app` as a visitor does, and print what was seen as JSON:
// node visit.mjs URL CHROMIUM PICTURE [SCREENSHOTS]
import { createRequire } from 'node:module';

const require = createRequire(new URL('../../web/package.json', import.meta.url));
const { chromium } = require('playwright-core');

const [url, executablePath, picture, screenshots] = process.argv.slice(2);
const QUIET = [
  '--no-sandbox',
  '--disable-background-networking',
  '--disable-component-update',
  '--disable-sync',
  '--no-first-run',
];
const seen = { foreign: [], problems: [], captions: [], answers: [], shares: 0, facts: '' };
const browser = await chromium.launch({ executablePath, args: QUIET });
const page = await browser.newPage({ viewport: { width: 1200, height: 900 } });
page.setDefaultTimeout(20_000);
page.on('request', (request) => {
  const ours = [url, 'data:', 'blob:'].some((start) => request.url().startsWith(start));
  if (!ours) seen.foreign.push(request.url());
});
page.on('pageerror', (error) => seen.problems.push(error.message));
page.on('console', (line) => {
  if (line.type() === 'error') seen.problems.push(line.text());
});
let shots = 0;
const shoot = async () => {
  shots += 1;
  if (screenshots) await page.screenshot({ path: `${screenshots}/${shots}.png` });
};

// Caption a drawn scene, then an upload.
await page.goto(url);
const caption = page.locator('#caption textarea');
const captioned = async () => {
  await caption.evaluate((area) => {
    area.dataset.before = area.value;
  });
  await page.getByRole('button', { name: 'Caption', exact: true }).click();
  await page.waitForFunction(() => {
    const area = document.querySelector('#caption textarea');
    return area && area.value && area.value !== area.dataset.before;
  });
  await page.getByRole('button', { name: 'Caption', exact: true }).isEnabled();
  let last = '';
  for (let same = 0; same < 4; ) {
    const text = await caption.inputValue();
    same = text === last ? same + 1 : 0;
    last = text;
    await page.waitForTimeout(250);
  }
  seen.captions.push(last);
  await shoot();
};
seen.facts = await page.locator('h1 + p').innerText();
await page.locator('button.gallery-item').first().click();
await page.locator('#image img').waitFor();
await captioned();
await page.locator('#image').getByLabel(/clear|remove/i).click();
await page.locator('#image input[type=file]').setInputFiles(picture);
await page.locator('#image img').waitFor();
await captioned();

// Ask an example, then a question that builds on it.
await page.getByRole('tab', { name: 'Chat' }).click();
await shoot();
const answered = async (number) => {
  const bubbles = page.locator('.bot.message');
  await page.waitForFunction(
    (count) => document.querySelectorAll('.bot.message').length >= count,
    number,
  );
  let last = '';
  for (let same = 0; same < 4; ) {
    const text = (await bubbles.nth(number - 1).innerText()).trim();
    same = text && text === last ? same + 1 : 0;
    last = text;
    await page.waitForTimeout(250);
  }
  seen.answers.push(last);
  await shoot();
};
await page.locator('button.example').nth(4).click();
await answered(1);
await page.getByPlaceholder('Ask a question').fill('what color is the background?');
await page.keyboard.press('Enter');
await answered(2);
seen.shares = await page.locator('[title*="hare"]:visible, [aria-label*="hare"]:visible').count();
console.log(JSON.stringify(seen));
await browser.close();
