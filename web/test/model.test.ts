/** An answer as a stream: its pieces, its end, and all the ways in which it ends early. */

import { afterEach, beforeEach, expect, test, vi } from 'vitest';
import type { Caption } from '../src/caption.js';
import { Link } from '../src/link.js';
import { Model } from '../src/model.js';
import type { CaptionData, ModelInfo, Question } from '../src/protocol.js';
import { FakeWorker } from './fake-worker.js';

const ID = 1; // of the first request of a link
const caption = { text: 'a red square', tokenIds: [1, 2, 3] } as unknown as CaptionData;

beforeEach(() => {
  vi.stubGlobal('Worker', FakeWorker);
});

afterEach(() => {
  vi.unstubAllGlobals();
});

const piece = (text: string) => FakeWorker.last.say({ type: 'piece', id: ID, text });
const generated = () =>
  FakeWorker.last.say({ type: 'generated', id: ID, response: { caption, history: 'text' } });
const aborts = () => FakeWorker.last.sent.filter(one => one.type === 'abort');

function open(signal?: AbortSignal) {
  const model = new Model(new Link(), { device: 'webgpu' } as ModelInfo);
  const question = { images: [] } as unknown as Question;
  const told: string[] = [];
  const stream = model.stream(question, signal, text => told.push(text));
  return { model, stream, told };
}

/** Read a stream to its end or its error. */
async function read(stream: AsyncGenerator<string, Caption>) {
  const pieces: string[] = [];
  try {
    for (;;) {
      const next = await stream.next();
      if (next.done) return { pieces, whole: next.value.text };
      pieces.push(next.value);
    }
  } catch (error) {
    return { pieces, error };
  }
}

test('pieces come as they are made, then the whole', async () => {
  const { stream, told } = open();
  const first = stream.next();
  piece('a red');
  expect(await first).toEqual({ done: false, value: 'a red' });
  const rest = read(stream);
  piece(' square');
  generated();
  expect(await rest).toEqual({ pieces: [' square'], whole: 'a red square' });
  expect(told).toEqual(['text']);
});

test('pieces wait in order, and the end is told before the last is read', async () => {
  const { stream, told } = open();
  const first = stream.next();
  for (const text of ['a', ' red', ' square']) piece(text);
  generated();
  expect((await first).value).toBe('a');
  expect((await stream.next()).value).toBe(' red');
  expect(told).toEqual([]);
  expect((await stream.next()).value).toBe(' square');
  expect(told).toEqual(['text']);
  expect((await stream.next()).done).toBe(true);
  expect(told).toEqual(['text']);
});

test('an answer without any text ends too', async () => {
  const { stream, told } = open();
  const whole = read(stream);
  generated();
  expect(await whole).toEqual({ pieces: [], whole: 'a red square' });
  expect(told).toEqual(['text']);
});

test('leaving the loop early aborts the work, and late pieces harm nothing', async () => {
  const { stream, told } = open();
  const first = stream.next();
  piece('a');
  await first;
  await stream.return(undefined as never);
  expect(aborts()).toEqual([{ type: 'abort', id: ID }]);
  piece(' red'); // it had been sent before the abort
  FakeWorker.last.say({ type: 'aborted', id: ID });
  await Promise.resolve();
  expect((await stream.next()).done).toBe(true);
  expect(told).toEqual([]);
});

test('leaving the loop after the last piece aborts nothing', async () => {
  const { stream } = open();
  const first = stream.next();
  piece('a');
  generated();
  await first;
  await stream.return(undefined as never);
  expect(aborts()).toEqual([]);
});

test('a worker that fails ends the stream, after the pieces that it made', async () => {
  const { model, stream, told } = open();
  const first = stream.next();
  piece('a');
  piece(' red');
  FakeWorker.last.onerror?.({ message: 'out of memory' });
  expect((await first).value).toBe('a');
  const error = { kind: 'WorkerError', code: 'worker.failed' };
  expect(await read(stream)).toMatchObject({ pieces: [' red'], error });
  expect(FakeWorker.last.terminated).toBe(1);
  expect(told).toEqual([]);
  const again = model.stream({ images: [] } as unknown as Question, undefined);
  expect(await read(again)).toMatchObject({ pieces: [], error });
});

test('a model that is disposed ends the stream', async () => {
  const { model, stream } = open();
  const found = read(stream);
  model.link.close();
  expect(await found).toMatchObject({ pieces: [], error: { code: 'model.not-loaded' } });
});

test('an error of the worker keeps its code', async () => {
  const { stream } = open();
  const found = read(stream);
  const error = { kind: 'PromptError', code: 'prompt.too-long', message: 'm', hint: 'h' } as const;
  FakeWorker.last.say({ type: 'failed', id: ID, error });
  expect(await found).toMatchObject({ pieces: [], error });
});

test("an abort ends with the signal's own reason", async () => {
  const controller = new AbortController();
  const { stream } = open(controller.signal);
  const found = read(stream);
  controller.abort('enough');
  expect(aborts()).toEqual([{ type: 'abort', id: ID }]);
  FakeWorker.last.say({ type: 'aborted', id: ID });
  expect(await found).toEqual({ pieces: [], error: 'enough' });
});

test('an abort counts also where the worker was done before it heard of that', async () => {
  const controller = new AbortController();
  const { stream, told } = open(controller.signal);
  const first = stream.next();
  piece('a');
  piece(' red');
  generated();
  await first;
  controller.abort('enough');
  expect(await read(stream)).toEqual({ pieces: [], error: 'enough' });
  expect(told).toEqual([]);
});

test('another device that takes over is known afterwards', async () => {
  const { model, stream } = open();
  const found = read(stream);
  FakeWorker.last.say({ type: 'changed', id: ID, info: { device: 'wasm' } as ModelInfo });
  generated();
  await found;
  expect(model.info.device).toBe('wasm');
});
