/** The page's end of the line to the worker. */

import { VlmportError, firstLine } from './errors.js';
import type { Reply, Request, Started } from './protocol.js';
import type { Watched } from './runtime/watched.js';

type Unnumbered<T> = T extends { readonly id: number } ? Omit<T, 'id'> : never;
type Event = Exclude<Reply, { type: 'failed' | 'aborted' | 'watched' }>;

const SECONDS = 10; // of a template or a tokenizer; those of real models take milliseconds

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

  /** Throws WorkerError where the page may not have one. */
  constructor() {
    try {
      this.worker = new Worker(new URL('./worker.js', import.meta.url), { type: 'module' });
    } catch (error) {
      const message = `the worker can't be started (${firstLine(error)})`;
      const hint =
        'serve the package from the origin of the page, and let its policy (CSP) allow workers';
      throw new VlmportError('WorkerError', 'worker.not-started', message, hint);
    }
    this.worker.onmessage = ({ data }: MessageEvent<Reply>) => this.receive(data);
    this.worker.onerror = event => {
      const detail = event.message || 'its script did not load';
      this.end(
        new VlmportError(
          'WorkerError',
          'worker.failed',
          `the worker failed: ${detail}`,
          'load the page again',
        ),
      );
    };
  }

  /** Send a request; `onReply` hears all that comes for it, and says by `true` what is the last. */
  request(
    request: Unnumbered<Started>,
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
        // An abort ends with the signal's own reason.
        fail: error => (done(), reject(signal?.aborted ? signal.reason : error)),
      });
      signal?.addEventListener('abort', abort);
      this.post({ ...request, id } as Started, transfer);
    });
  }

  /** End the worker, and with it all that it holds. */
  close(): void {
    this.end(
      new VlmportError(
        'WorkerError',
        'model.not-loaded',
        'this model was disposed',
        'load it again',
      ),
    );
  }

  /** Send what needs no answer. */
  post(request: Request, transfer: Transferable[] = []): void {
    this.worker.postMessage(request, transfer);
  }

  private receive(reply: Reply): void {
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

  /** A worker in a loop hears no message: it can only be ended. */
  private endLate(doing: Watched): void {
    const message = `the ${doing === 'template' ? 'chat template' : 'tokenizer'} of this model was stopped: it has not ended after ${SECONDS} seconds`;
    const hint = 'is it as its publisher wrote it? the model has to be loaded again';
    this.end(new VlmportError('PromptError', `${doing}.too-slow` as const, message, hint));
  }

  private end(error: VlmportError): void {
    clearTimeout(this.watch);
    this.ended ??= error;
    this.worker.terminate();
    for (const { fail } of [...this.pending.values()]) fail(error);
  }
}
