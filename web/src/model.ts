/** A loaded model as the page holds it: the link to its worker, and the facts about it. */

import { Caption } from './caption.js';
import { transferOf } from './image-source.js';
import type { Link } from './link.js';
import type { GeneratedResponse, ModelInfo, NumberedImage, Question } from './protocol.js';

export class Model {
  private conversations = 0;

  constructor(
    readonly link: Link,
    private current: ModelInfo,
  ) {}

  get info(): ModelInfo {
    return this.current;
  }

  /** Return a number for a new conversation. */
  newConversation(): number {
    return ++this.conversations;
  }

  /**
   * Stream the pieces of an answer as they are made; the generator returns the whole answer.
   *
   * `onDone` is called with the text of the answer once it is complete: before the last piece is
   * given out where the worker has finished by then, else after it. Leaving the loop ends the
   * generation. An error of the worker comes after the pieces that were made before it.
   */
  async *stream(
    question: Question,
    signal: AbortSignal | undefined,
    onDone: (history: string) => void = () => {},
  ): AsyncGenerator<string, Caption> {
    const left = new AbortController(); // the caller has left the loop
    let queue!: ReadableStreamDefaultController<string>;
    const start = (controller: typeof queue) => void (queue = controller);
    const pieces = new ReadableStream({ start }, { highWaterMark: 0 }).getReader();
    let response = null as GeneratedResponse | null;
    const finished = this.link
      .request(
        { type: 'generate', question },
        reply => {
          if (reply.type === 'piece') queue.enqueue(reply.text);
          if (reply.type === 'changed') this.current = reply.info;
          if (reply.type === 'generated') response = reply.response;
          return response !== null;
        },
        {
          signal: signal ? AbortSignal.any([signal, left.signal]) : left.signal,
          transfer: question.images.flatMap(transferOf),
        },
      )
      .finally(() => queue.close());
    finished.catch(() => {}); // it is awaited below
    let isTold = false;
    try {
      for (;;) {
        const { done, value } = await pieces.read();
        signal?.throwIfAborted(); // the worker may have finished before it saw the abort
        if (response && queue.desiredSize === 0 && !isTold) {
          isTold = true; // no piece is waiting
          onDone(response.history);
        }
        if (done) break;
        yield value;
      }
      await finished;
      return new Caption(response!.caption);
    } finally {
      if (response === null) left.abort();
    }
  }

  /** Have the worker read and process an image of a conversation. */
  async attach(
    conversation: number,
    image: NumberedImage,
    imageOptions: Question['imageOptions'],
  ): Promise<void> {
    await this.link.request(
      { type: 'attach', conversation, image, imageOptions },
      reply => {
        if (reply.type === 'changed') this.current = reply.info;
        return reply.type === 'attached';
      },
      { transfer: transferOf(image) },
    );
  }
}
