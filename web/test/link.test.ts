/** The page ends a worker that does not return from a template or a tokenizer. */

import { afterEach, beforeEach, expect, test, vi } from 'vitest';
import { Link } from '../src/link.js';
import { onWatched, watched } from '../src/runtime/watched.js';
import type { WorkerReply } from '../src/protocol.js';
import { FakeWorker } from './fake-worker.js';

beforeEach(() => {
  vi.useFakeTimers();
  vi.stubGlobal('Worker', FakeWorker);
});

afterEach(() => {
  vi.useRealTimers();
  vi.unstubAllGlobals();
});

const options = { url: 'x', device: 'auto', precision: 'auto', threads: null, wasmPaths: null };

function ask(link: Link): Promise<unknown> {
  const load = { type: 'load', options } as Parameters<Link['request']>[0];
  return link.request(load, reply => reply.type === 'loaded').catch((error: unknown) => error);
}

test.each(['template', 'tokenizer'] as const)('a %s that never ends', async doing => {
  const link = new Link();
  const answer = ask(link);
  FakeWorker.last.say({ type: 'watched', id: 0, doing });
  vi.advanceTimersByTime(9_000);
  expect(FakeWorker.last.terminated).toBe(0);
  vi.advanceTimersByTime(2_000);
  expect(FakeWorker.last.terminated).toBe(1);
  expect(await answer).toMatchObject({ kind: 'PromptError', code: `${doing}.too-slow` });
  expect(await ask(link)).toMatchObject({ code: `${doing}.too-slow` });
});

test('one that ends in time, before a long answer', async () => {
  const link = new Link();
  const answer = ask(link);
  FakeWorker.last.say({ type: 'watched', id: 0, doing: 'template' });
  FakeWorker.last.say({ type: 'watched', id: 0, doing: null });
  vi.advanceTimersByTime(600_000);
  expect(FakeWorker.last.terminated).toBe(0);
  FakeWorker.last.say({ type: 'loaded', id: 1, info: {} } as unknown as WorkerReply);
  await answer;
});

test('begin and end of watched work are told, also where it fails', () => {
  const told: unknown[] = [];
  onWatched(doing => told.push(doing));
  expect(watched('template', () => 7)).toBe(7);
  const fail = () => {
    throw new Error('no');
  };
  expect(() => watched('tokenizer', fail)).toThrow('no');
  expect(told).toEqual(['template', null, 'tokenizer', null]);
  onWatched(() => {});
});
