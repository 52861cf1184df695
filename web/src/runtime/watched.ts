/**
 * Tell the page before a template or a tokenizer of the bundle runs, and when it has ended: a worker
 * that is busy hears nothing, so only the page can end one that does not come back.
 */

export type Watched = 'template' | 'tokenizer';

let tell: (doing: Watched | null) => void = () => {};

/** Who hears what is being done. */
export function onWatched(listener: typeof tell): void {
  tell = listener;
}

export function watched<T>(doing: Watched, work: () => T): T {
  tell(doing);
  try {
    return work();
  } finally {
    tell(null);
  }
}
