/**
 * What the worker keeps between turns. What was said stands on the page, which sends all of it with
 * each question; here are the pictures that it names by number, and the cache.
 */

import type { Held, Kept } from './preparing.js';
import type { Picture } from './images/features.js';

export class Conversation implements Kept {
  held: Held | null = null;
  readonly pictures = new Map<number, Picture>();

  dispose(): void {
    this.held?.cache.dispose();
    this.held = null;
    this.pictures.clear();
  }
}

export class Conversations {
  private readonly all = new Map<number, Conversation>();

  /** The one with this number, which begins with its first request. */
  of(number: number): Conversation {
    const known = this.all.get(number) ?? new Conversation();
    this.all.set(number, known);
    return known;
  }

  /** Forget some pictures of a conversation, or all of it. */
  forget(number: number, pictures: readonly number[] | null): void {
    const known = this.all.get(number);
    if (pictures === null) {
      known?.dispose();
      this.all.delete(number);
    } else for (const picture of pictures) known?.pictures.delete(picture);
  }
}
