/** A model that is loaded, as the page holds it: the line to the worker, and what is known of it. */

import { Caption } from './caption.js';
import type { Link } from './link.js';
import { transferOf } from './picture.js';
import type { Asked, Info, NumberedPicture } from './protocol.js';

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
   * The answer, piece by piece as it is made; the generator returns the whole. `onDone` is called
   * with the text without its stop token, before the last piece is given out. Leaving the loop earlier ends the generation.
   */
  async *answer(
    asked: Asked,
    signal: AbortSignal | undefined,
    onDone: (said: string) => void = () => {},
  ): AsyncGenerator<string, Caption> {
    const left = new AbortController(); // the caller left the loop
    const waiting: string[] = [];
    let caption: Caption | null = null;
    let said = '';
    let wake = () => {};
    const finished = this.link.request(
      { type: 'answer', asked },
      reply => {
        if (reply.type === 'piece') waiting.push(reply.text);
        if (reply.type === 'changed') this.known = reply.info;
        if (reply.type === 'answered') {
          caption = new Caption(reply.caption);
          said = reply.said;
        }
        wake();
        return caption !== null;
      },
      {
        signal: signal ? AbortSignal.any([signal, left.signal]) : left.signal,
        transfer: asked.pictures.flatMap(one => (one.picture ? transferOf(one.picture) : [])),
      },
    );
    finished.catch(() => {}); // heard below
    const done = (): Caption | null => caption; // it changes while this waits
    try {
      for (let told = false; ;) {
        const piece = new Promise<void>(resolve => (wake = resolve));
        if (!waiting.length && done() === null) await Promise.race([piece, finished]);
        for (;;) {
          signal?.throwIfAborted(); // also where the worker was done before it heard of that
          const next = waiting.shift();
          const whole = done();
          if (whole && !waiting.length && !told) {
            told = true;
            onDone(said);
          }
          if (next === undefined) break;
          yield next;
        }
        const whole = done();
        if (whole !== null) return whole;
      }
    } finally {
      if (done() === null) left.abort();
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
