/**
 * Keep the page, its scripts and ONNX Runtime, so that a second visit needs no server.
 *
 * The package keeps the model itself, chunk by chunk.
 */

const CACHE = 'vlmport-page-__VERSION__';
const FILES = [/* FILES */];

addEventListener('install', event => {
  event.waitUntil(
    (async () => {
      const cache = await caches.open(CACHE);
      // All names but the page's own contain a hash of the contents.
      await cache.addAll(
        FILES.map(name => new Request(name, name === './' ? { cache: 'reload' } : {})),
      );
      await skipWaiting();
    })(),
  );
});

addEventListener('activate', event => {
  event.waitUntil(
    (async () => {
      for (const name of await caches.keys()) {
        if (name.startsWith('vlmport-page-') && name !== CACHE) await caches.delete(name);
      }
      await clients.claim();
    })(),
  );
});

addEventListener('fetch', event => {
  const { request } = event;
  if (request.method !== 'GET') return;
  if (request.mode === 'navigate') event.respondWith(navigate(request));
  else if (isOurs(request.url)) event.respondWith(keptFirst(request));
});

const kept = new Set(FILES.map(name => new URL(name, registration.scope).href));
const isOurs = url => kept.has(url.split('?')[0]);

/** Return the newest page where there is a server. */
async function navigate(request) {
  try {
    return await fetch(request);
  } catch {
    const page = await caches.match(new URL('./', registration.scope), { cacheName: CACHE });
    return page ?? Response.error();
  }
}

async function keptFirst(request) {
  return (await caches.match(request, { cacheName: CACHE })) ?? fetch(request);
}
