/**
 * Keep chunks and manifests in Cache Storage between visits.
 *
 * The key of a chunk is its SHA-256, so two bundles share the chunks that they have in common. Each
 * chunk is stored as a complete response, because `put` refuses partial ones.
 */

import { wholeAddress } from '../address.js';
import { VlmportError } from '../errors.js';
import { CHUNK_BYTES, MANIFEST, type Manifest, parseManifest } from './manifest.js';

const CACHE_NAME = 'vlmport-1';
const CHUNKS = '/.vlmport/chunks/';
const MODELS = '/.vlmport/models/';

/** Storage for the chunks and the manifest of a bundle. */
export interface Store {
  /** Why chunks are not kept, in plain words; null while they are. */
  readonly problem: string | null;
  getChunk(hash: string): Promise<Uint8Array<ArrayBuffer> | null>;
  putChunk(hash: string, bytes: Uint8Array<ArrayBuffer>): Promise<void>;
  deleteChunk(hash: string): Promise<void>;
  getManifest(base: URL): Promise<string | null>;
  putManifest(base: URL, text: string): Promise<void>;
}

/** A model of which files are kept. */
export interface CachedModel {
  /** The bundle's address, with a slash at the end. */
  readonly url: string;
  readonly name: string;
  /** Number of bytes that are kept. Chunks that two models share count for both. */
  readonly bytes: number;
}

/** Open Cache Storage, or a store that keeps nothing and says why. */
export async function openStore(): Promise<Store> {
  const why = 'not kept for the next visit: ';
  if (typeof caches === 'undefined') {
    const reason = globalThis.isSecureContext
      ? 'this browser has no Cache Storage'
      : 'the page is not on https or localhost, so the browser offers no Cache Storage';
    return new NoStore(why + reason);
  }
  try {
    return new CacheStore(await caches.open(CACHE_NAME));
  } catch {
    return new NoStore(`${why}the browser refuses Cache Storage here (a private window?)`);
  }
}

/** A store that keeps nothing. */
export class NoStore implements Store {
  constructor(readonly problem: string) {}
  getChunk = () => Promise.resolve(null);
  putChunk = () => Promise.resolve();
  deleteChunk = () => Promise.resolve();
  getManifest = () => Promise.resolve(null);
  putManifest = () => Promise.resolve();
}

class CacheStore implements Store {
  problem: string | null = null;

  constructor(private readonly cache: Cache) {}

  async getChunk(hash: string): Promise<Uint8Array<ArrayBuffer> | null> {
    const response = await this.get(chunkKey(hash));
    return response ? new Uint8Array(await response.arrayBuffer()) : null;
  }

  async putChunk(hash: string, bytes: Uint8Array<ArrayBuffer>): Promise<void> {
    const headers = { 'content-length': String(bytes.length) };
    await this.put(chunkKey(hash), new Response(bytes, { headers }));
  }

  async deleteChunk(hash: string): Promise<void> {
    await this.cache.delete(chunkKey(hash));
  }

  async getManifest(base: URL): Promise<string | null> {
    const response = await this.get(modelKey(base.href));
    return response ? response.text() : null;
  }

  async putManifest(base: URL, text: string): Promise<void> {
    const before = await this.getManifest(base);
    if (before === text) return;
    await this.put(modelKey(base.href), new Response(text));
    if (before !== null) await sweep(this.cache); // another version of the same model
  }

  /** Read an entry; one that can't be read counts as missing. */
  private async get(key: string): Promise<Response | undefined> {
    try {
      return await this.cache.match(key);
    } catch {
      this.problem = "not kept for the next visit: the browser can't read its Cache Storage";
      return undefined;
    }
  }

  /** Write an entry. After an error, such as a full disk, nothing more is kept. */
  private async put(key: string, response: Response): Promise<void> {
    if (this.problem) return;
    try {
      await this.cache.put(key, response);
    } catch {
      this.problem = 'not kept for the next visit: the browser has no space left for this page';
    }
  }
}

const origin = () => globalThis.location.origin;
const chunkKey = (hash: string) => origin() + CHUNKS + hash;
const modelKey = (url: string) => origin() + MODELS + encodeURIComponent(url);

/** List the models of which this browser keeps files for the page's origin. */
export async function cachedModels(): Promise<CachedModel[]> {
  const cache = await openCache();
  if (cache === null) return [];
  const kept = await keptHashes(cache);
  return (await keptManifests(cache)).map(({ url, manifest }) => {
    const sizes = chunkSizes(manifest);
    const bytes = [...sizes].reduce((sum, [hash, size]) => sum + (kept.has(hash) ? size : 0), 0);
    return { url, name: manifest.name, bytes };
  });
}

/** Delete the files of one model, or of all. Chunks that another model needs stay. */
export async function clearCache(url?: string): Promise<void> {
  const cache = await openCache();
  if (cache === null) return;
  if (url === undefined) {
    await caches.delete(CACHE_NAME);
    return;
  }
  await cache.delete(modelKey(bundleAddress(url).href));
  await sweep(cache);
}

/** Delete the chunks that no model needs. */
async function sweep(cache: Cache): Promise<void> {
  const kept = await keptManifests(cache);
  const needed = new Set(kept.flatMap(one => [...chunkSizes(one.manifest).keys()]));
  for (const hash of await keptHashes(cache)) {
    if (!needed.has(hash)) await cache.delete(chunkKey(hash));
  }
}

async function openCache(): Promise<Cache | null> {
  if (typeof caches === 'undefined' || !(await caches.has(CACHE_NAME))) return null;
  return caches.open(CACHE_NAME);
}

async function keptHashes(cache: Cache): Promise<Set<string>> {
  const paths = (await cache.keys()).map(request => new URL(request.url).pathname);
  const chunks = paths.filter(path => path.startsWith(CHUNKS));
  return new Set(chunks.map(path => path.slice(CHUNKS.length)));
}

async function keptManifests(cache: Cache): Promise<{ url: string; manifest: Manifest }[]> {
  const found = [];
  for (const request of await cache.keys()) {
    const { pathname } = new URL(request.url);
    if (!pathname.startsWith(MODELS)) continue;
    const url = decodeURIComponent(pathname.slice(MODELS.length));
    const text = await (await cache.match(request))?.text();
    try {
      found.push({ url, manifest: parseManifest(text ?? '', url + MANIFEST) });
    } catch {
      await cache.delete(request); // its version is not supported
    }
  }
  return found;
}

function chunkSizes(manifest: Manifest): Map<string, number> {
  const sizes = new Map<string, number>();
  for (const { size, chunks } of Object.values(manifest.files)) {
    chunks.forEach((hash, i) => sizes.set(hash, Math.min(CHUNK_BYTES, size - i * CHUNK_BYTES)));
  }
  return sizes;
}

/** Return a bundle's address with a slash at the end; a relative one starts at the page. */
export function bundleAddress(url: string | URL): URL {
  try {
    const address = wholeAddress(url);
    address.search = address.hash = '';
    if (address.pathname.endsWith(`/${MANIFEST}`)) {
      address.pathname = address.pathname.slice(0, -MANIFEST.length);
    }
    if (!address.pathname.endsWith('/')) address.pathname += '/';
    return address;
  } catch {
    const hint = "for example './models/shapes/'";
    throw new VlmportError('OptionError', 'option.wrong-value', `'${url}' is not a URL`, hint);
  }
}
