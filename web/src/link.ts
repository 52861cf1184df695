/** The connection from the page to its worker. */

import { VlmportError, firstLine } from './errors.js';
import type { RequestWithReply, WorkerReply, WorkerRequest } from './protocol.js';
import type { Watched } from './runtime/watched.js';

type Unnumbered<T> = T extends { readonly id: number } ? Omit<T, 'id'> : never;
type Event = Exclude<WorkerReply, { type: 'failed' | 'aborted' | 'watched' }>;

const SECONDS = 10; // for a template or a tokenizer; those of real models take milliseconds

interface Pending {
  readonly onReply: (reply: Event) => void;
  readonly fail: (error: unknown) => void;
}

export class Link {
  private readonly worker: Worker;
  private readonly pending = new Map<number, Pending>();
  private next = 1;
  private ended: VlmportError | null = null;
  private watch: ReturnType<typeof setTimeout> | undefined;

  /** Start a worker. Throws WorkerError where the page is not allowed to. */
  constructor() {
    try {
      this.worker = new Worker(new URL('./worker.js', import.meta.url), { type: 'module' });
    } catch (error) {
      const message = `the worker can't be started (${firstLine(error)})`;
      const hint =
        'serve the package from the origin of the page, and let its policy (CSP) allow workers';
      throw new VlmportError('WorkerError', 'worker.not-started', message, hint);
    }
    this.worker.onmessage = ({ data }: MessageEvent<WorkerReply>) => this.receive(data);
    this.worker.onerror = event => {
      const detail = event.message || 'its script did not load';
      const message = `the worker failed: ${detail}`;
      this.end(new VlmportError('WorkerError', 'worker.failed', message, 'load the page again'));
    };
  }

  /** Send a request. `onReply` is called with each reply, and returns true for the last one. */
  request(
    request: Unnumbered<RequestWithReply>,
    onReply: (reply: Event) => boolean,
    { signal, transfer = [] }: { signal?: AbortSignal | undefined; transfer?: Transferable[] } = {},
  ): Promise<void> {
    return new Promise((resolve, reject) => {
      signal?.throwIfAborted();
      if (this.ended) throw this.ended;
      const id = this.next++;
      const abort = () => this.post({ type: 'abort', id });
      const done = () => {
        this.pending.delete(id);
        signal?.removeEventListener('abort', abort);
      };
      this.pending.set(id, {
        onReply: reply => {
          if (onReply(reply)) (done(), resolve());
        },
        // The error of an abort is the signal's reason.
        fail: error => (done(), reject(signal?.aborted ? signal.reason : error)),
      });
      signal?.addEventListener('abort', abort);
      this.post({ ...request, id } as RequestWithReply, transfer);
    });
  }

  /** End the worker, and free its memory. */
  close(): void {
    const message = 'this model was disposed';
    this.end(new VlmportError('WorkerError', 'model.not-loaded', message, 'load it again'));
  }

  /** Send a message that has no reply. */
  post(request: WorkerRequest, transfer: Transferable[] = []): void {
    this.worker.postMessage(request, transfer);
  }

  private receive(reply: WorkerReply): void {
    if (reply.type === 'watched') {
      clearTimeout(this.watch);
      const { doing } = reply;
      if (doing !== null) this.watch = setTimeout(() => this.endLate(doing), SECONDS * 1000);
      return;
    }
    const pending = this.pending.get(reply.id);
    if (reply.type === 'failed') pending?.fail(VlmportError.from(reply.error));
    else if (reply.type === 'aborted') pending?.fail(new DOMException('aborted', 'AbortError'));
    else pending?.onReply(reply);
  }

  /** End a worker that does not return from a template or a tokenizer: it receives no message. */
  private endLate(doing: Watched): void {
    const message = `the ${doing === 'template' ? 'chat template' : 'tokenizer'} of this model was stopped after ${SECONDS} seconds`;
    const hint = 'check that its files are those of its publisher, and load the model again';
    this.end(new VlmportError('PromptError', `${doing}.too-slow` as const, message, hint));
  }

  private end(error: VlmportError): void {
    clearTimeout(this.watch);
    this.ended ??= error;
    this.worker.terminate();
    for (const { fail } of [...this.pending.values()]) fail(error);
  }
}
