/** Complete addresses. */

/**
 * Resolve a relative address against the page, or in a worker against its script. Throws where it
 * is not an address.
 */
export function wholeAddress(address: string | URL): URL {
  // TypeScript believes that every script has a document.
  const page = globalThis.document as Document | undefined;
  return new URL(address, page?.baseURI ?? globalThis.location.href);
}
