/** A worker for tests, which records its messages and sends those of the test. */

import type { WorkerReply } from '../src/protocol.js';

export class FakeWorker {
  static last: FakeWorker;
  onmessage: ((event: { data: WorkerReply }) => void) | null = null;
  onerror: ((event: { message: string }) => void) | null = null;
  readonly sent: { readonly type: string; readonly id?: number }[] = [];
  terminated = 0;

  constructor() {
    FakeWorker.last = this;
  }

  postMessage(message: FakeWorker['sent'][number]): void {
    this.sent.push(message);
  }

  terminate(): void {
    this.terminated++;
  }

  say(data: WorkerReply): void {
    this.onmessage?.({ data });
  }
}
