/**
 * The worker's part of conversations: images by number, and the key-value cache.
 *
 * The messages are on the page (conversation.ts), which sends all of them with each question.
 */

import type { GeneratedResponse } from '../protocol.js';
import { openCache } from './graphs/cache.js';
import type { Components } from './graphs/components.js';
import type { PromptImage } from './images/features.js';
import type { PreparedRequest, ReusablePrefix } from './preparing.js';
import type { Prompter } from './prompt.js';
import { type ResponseOptions, respond } from './response.js';

export class ConversationCache {
  readonly images = new Map<number, PromptImage>();
  private prefix: ReusablePrefix | null = null;

  /** Return the cache and its prompt, unless they belong to other graphs (of a lost GPU). */
  reusableBy(components: Components): ReusablePrefix | null {
    return this.prefix?.cache.components === components ? this.prefix : null;
  }

  /**
   * Generate the answer of a request, and keep the cache for the next turn: also of an answer that
   * was aborted, but not of one that failed. Throws as `respond` does.
   */
  async respond(
    prepared: PreparedRequest,
    components: Components,
    prompter: Prompter,
    options: ResponseOptions,
  ): Promise<GeneratedResponse> {
    const { request, ids, cachedTokens, imageRows } = prepared;
    const capacity = ids.length + request.maxNewTokens - 1;
    const cache = this.reusableBy(components)?.cache ?? openCache(components, capacity);
    const { search } = request;
    try {
      cache.truncate(cachedTokens);
      cache.reserve(capacity);
      return await respond(prepared, cache, prompter.tokenizer, options);
    } catch (error) {
      if (!options.signal.aborted) cache.truncate(0); // its contents are not known
      throw error;
    } finally {
      if (search.rows > 1) cache.truncate(ids.length); // its rows have only the prompt in common
      const tokens = search.rows > 1 ? [] : (search.results()[0]?.tokens ?? []);
      this.prefix = { cache, ids: [...ids, ...tokens].slice(0, cache.length), imageRows };
    }
  }

  dispose(): void {
    this.prefix?.cache.dispose();
    this.prefix = null;
    this.images.clear();
  }
}

export class ConversationCaches {
  private readonly all = new Map<number, ConversationCache>();

  /** Return the cache of a conversation. It is created at the first request. */
  of(number: number): ConversationCache {
    const known = this.all.get(number) ?? new ConversationCache();
    this.all.set(number, known);
    return known;
  }

  /** Remove some images of a conversation, or all of it (null). */
  forget(number: number, images: readonly number[] | null): void {
    const known = this.all.get(number);
    if (images === null) {
      known?.dispose();
      this.all.delete(number);
    } else for (const image of images) known?.images.delete(image);
  }
}
