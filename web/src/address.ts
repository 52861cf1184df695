/** Addresses that people write, made whole. */

/** A relative address starts at the page, or in a worker at its script. Throws where it is none. */
export function wholeAddress(address: string | URL): URL {
  // TypeScript believes that every script has a document.
  const page = globalThis.document as Document | undefined;
  return new URL(address, page?.baseURI ?? globalThis.location.href);
}
