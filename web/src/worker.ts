/** The worker: everything heavy happens here, one request after the other. */

import { VlmportError, asVlmportError, isAbort } from './errors.js';
import type { Reply, Request, Started } from './protocol.js';
import { Engine } from './runtime/engine.js';
import { onWatched } from './runtime/watched.js';

/** What of a worker's global scope is used here. */
interface Scope {
  onmessage: ((event: MessageEvent<Request>) => void) | null;
  postMessage(message: Reply): void;
}

const scope = globalThis as unknown as Scope;
const running = new Map<number, AbortController>();
let engine: Engine | null = null;
let last: Promise<void> = Promise.resolve();

onWatched(doing => scope.postMessage({ type: 'watched', id: 0, doing }));

scope.onmessage = ({ data: request }) => {
  if (request.type === 'abort') {
    running.get(request.id)?.abort();
    return;
  }
  if (request.type === 'forget') {
    last = last.then(() => engine?.forget(request.conversation, request.numbers));
    return;
  }
  const controller = new AbortController();
  running.set(request.id, controller);
  last = last.then(() => answer(request, controller.signal));
};

async function answer(request: Started, signal: AbortSignal) {
  const { id } = request;
  try {
    signal.throwIfAborted();
    scope.postMessage(await perform(request, signal));
  } catch (error) {
    if (signal.aborted || isAbort(error)) scope.postMessage({ type: 'aborted', id });
    else {
      const kind = request.type === 'load' ? 'DeviceError' : 'WorkerError';
      scope.postMessage({ type: 'failed', id, error: asVlmportError(error, kind).toPlain() });
    }
  } finally {
    running.delete(id);
  }
}

async function perform(request: Started, signal: AbortSignal): Promise<Reply> {
  const { id } = request;
  if (request.type === 'load') {
    const onProgress = throttled(progress => scope.postMessage({ type: 'progress', id, progress }));
    engine = await Engine.open(request.options, onProgress, signal);
    return { type: 'loaded', id, info: engine.info };
  }
  if (engine === null) {
    throw new VlmportError(
      'WorkerError',
      'model.not-loaded',
      'no bundle is loaded',
      'VLM.load(…) comes first',
    );
  }
  const hear = {
    onPiece: (text: string) => scope.postMessage({ type: 'piece', id, text }),
    onChange: (info: Engine['info']) => scope.postMessage({ type: 'changed', id, info }),
  };
  if (request.type === 'attach') {
    const { conversation, picture, imageOptions } = request;
    await engine.attach(conversation, picture, imageOptions, hear, signal);
    return { type: 'attached', id };
  }
  return { type: 'answered', id, ...(await engine.answer(request.asked, hear, signal)) };
}

type Tell = Parameters<typeof Engine.open>[1];

/** Not every few kilobytes: at most every 50 ms, and whenever something new begins. */
function throttled(tell: Tell): Tell {
  let then = -Infinity;
  let before = '';
  return progress => {
    const now = performance.now();
    const complete = progress.loadedBytes === progress.totalBytes;
    if (now - then < 50 && progress.phase === before && !complete) return;
    [then, before] = [now, progress.phase];
    tell(progress);
  };
}
