/** A model that is loaded, as the page holds it: the line to the worker, and what is known of it. */

import { Caption } from './caption.js';
import type { Link } from './link.js';
import { transferOf } from './picture.js';
import type { Asked, Info, NumberedPicture, Reply } from './protocol.js';

type Answered = Extract<Reply, { type: 'answered' }>;

export class Model {
  private conversations = 0;

  constructor(
    readonly link: Link,
    private known: Info,
  ) {}

  get info(): Info {
    return this.known;
  }

  /** A number for a new conversation. */
  newConversation(): number {
    return ++this.conversations;
  }

  /**
   * Stream the pieces of an answer as they are made; the generator returns the whole answer.
   *
   * `onDone` is called with the text without its stop token once the answer is complete: before the
   * last piece is given out where the worker is done by then, else after it. Leaving the loop ends
   * the generation. An error of the worker comes after the pieces that were made before it.
   */
  async *stream(
    asked: Asked,
    signal: AbortSignal | undefined,
    onDone: (said: string) => void = () => {},
  ): AsyncGenerator<string, Caption> {
    const left = new AbortController(); // the caller left the loop
    let queue!: ReadableStreamDefaultController<string>;
    const start = (controller: typeof queue) => void (queue = controller);
    const pieces = new ReadableStream({ start }, { highWaterMark: 0 }).getReader();
    let answer = null as Answered | null;
    const finished = this.link
      .request(
        { type: 'answer', asked },
        reply => {
          if (reply.type === 'piece') queue.enqueue(reply.text);
          if (reply.type === 'changed') this.known = reply.info;
          if (reply.type === 'answered') answer = reply;
          return answer !== null;
        },
        {
          signal: signal ? AbortSignal.any([signal, left.signal]) : left.signal,
          transfer: asked.pictures.flatMap(one => (one.picture ? transferOf(one.picture) : [])),
        },
      )
      .finally(() => queue.close());
    finished.catch(() => {}); // it is awaited below
    let told = false;
    try {
      for (;;) {
        const { done, value } = await pieces.read();
        signal?.throwIfAborted(); // also where the worker was done before it heard of that
        if (answer && queue.desiredSize === 0 && !told) {
          told = true; // no piece waits
          onDone(answer.said);
        }
        if (done) break;
        yield value;
      }
      await finished;
      return new Caption(answer!.caption);
    } finally {
      if (answer === null) left.abort();
    }
  }

  /** Have a picture of a conversation read and cut. */
  async attach(
    conversation: number,
    picture: NumberedPicture,
    imageOptions: Asked['imageOptions'],
  ): Promise<void> {
    await this.link.request(
      { type: 'attach', conversation, picture, imageOptions },
      reply => {
        if (reply.type === 'changed') this.known = reply.info;
        return reply.type === 'attached';
      },
      { transfer: picture.picture ? transferOf(picture.picture) : [] },
    );
  }
}
