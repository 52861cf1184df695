/** The worker: all heavy work is done here, one request after the other. */

import { VlmportError, asVlmportError, isAbort } from './errors.js';
import type { ModelInfo, RequestWithReply, WorkerReply, WorkerRequest } from './protocol.js';
import { Engine } from './runtime/engine.js';
import { onWatched } from './runtime/watched.js';

/** The parts of a worker's global scope that are used here. */
interface Scope {
  onmessage: ((event: MessageEvent<WorkerRequest>) => void) | null;
  postMessage(message: WorkerReply): void;
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
  last = last.then(() => serve(request, controller.signal));
};

/** Perform a request, and send its reply, its error or that it was aborted. */
async function serve(request: RequestWithReply, signal: AbortSignal): Promise<void> {
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

/** Do the work of a request, and return its reply. */
async function perform(request: RequestWithReply, signal: AbortSignal): Promise<WorkerReply> {
  const { id } = request;
  if (request.type === 'load') {
    const onProgress = throttled(progress => scope.postMessage({ type: 'progress', id, progress }));
    engine = await Engine.open(request.options, onProgress, signal);
    return { type: 'loaded', id, info: engine.info };
  }
  if (engine === null) {
    const message = 'no bundle is loaded';
    const hint = 'call VLM.load(…) first';
    throw new VlmportError('WorkerError', 'model.not-loaded', message, hint);
  }
  const listeners = {
    onPiece: (text: string) => scope.postMessage({ type: 'piece', id, text }),
    onChange: (info: ModelInfo) => scope.postMessage({ type: 'changed', id, info }),
  };
  if (request.type === 'attach') {
    const { conversation, image, imageOptions } = request;
    await engine.attach(conversation, image, imageOptions, listeners, signal);
    return { type: 'attached', id };
  }
  return {
    type: 'generated',
    id,
    response: await engine.generate(request.question, listeners, signal),
  };
}

type OnProgress = Parameters<typeof Engine.open>[1];

/** Report progress at most every 50 ms, and at once when a phase begins or all is loaded. */
function throttled(report: OnProgress): OnProgress {
  let lastTime = -Infinity;
  let lastPhase = '';
  return progress => {
    const now = performance.now();
    const complete = progress.loadedBytes === progress.totalBytes;
    if (now - lastTime < 50 && progress.phase === lastPhase && !complete) return;
    [lastTime, lastPhase] = [now, progress.phase];
    report(progress);
  };
}
