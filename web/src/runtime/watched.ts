/**
 * Tell the page when a template or a tokenizer of the bundle begins and ends. A busy worker
 * receives no message, so only the page can end one that does not return.
 */

export type Watched = 'template' | 'tokenizer';

let tell: (doing: Watched | null) => void = () => {};

/** Set the function that is called at each begin and end. */
export function onWatched(listener: typeof tell): void {
  tell = listener;
}

/** Run a template or a tokenizer, and tell the page. */
export function watched<T>(doing: Watched, work: () => T): T {
  tell(doing);
  try {
    return work();
  } finally {
    tell(null);
  }
}
