/**
 * Builds the demo page, and with `--mode test` the bare page of the browser tests.
 *
 * The page holds one build of ONNX Runtime, the one with WebGPU: its WebAssembly kernels are the
 * same, and a page that falls back need not fetch a second one. The tests' page holds both, as an
 * application has them that uses the package.
 */

import { createHash } from 'node:crypto';
import { readFileSync } from 'node:fs';
import { fileURLToPath } from 'node:url';
import { type Plugin, defineConfig } from 'vite';

const here = (path: string) => fileURLToPath(new URL(path, import.meta.url));

/** Writes sw.js with the names of all files that were built, so that a second visit needs none. */
function serviceWorker(): Plugin {
  return {
    name: 'service-worker',
    generateBundle(_, bundle) {
      const files = Object.keys(bundle).filter(name => name !== 'index.html');
      const page = bundle['index.html'];
      const html = page?.type === 'asset' ? page.source : '';
      const hash = createHash('sha256').update(files.join()).update(html);
      const version = hash.digest('hex').slice(0, 16);
      const source = readFileSync(here('demo/sw.js'), 'utf8')
        .replace('__VERSION__', version)
        .replace('[/* FILES */]', JSON.stringify(['./', ...files]));
      this.emitFile({ type: 'asset', fileName: 'sw.js', source });
    },
  };
}

export default defineConfig(({ mode }) => {
  const test = mode === 'test';
  const library = { '@vlmport/web': here('dist/index.js') };
  const oneRuntime = { 'onnxruntime-web/wasm': 'onnxruntime-web/webgpu' };
  const alias = test ? library : { ...library, ...oneRuntime };
  return {
    root: here(test ? 'browser/page' : 'demo'),
    base: './',
    resolve: { alias },
    worker: { format: 'es' },
    plugins: test ? [] : [serviceWorker()],
    build: {
      outDir: here(test ? 'browser/built' : '../src/vlmport/web_page'),
      emptyOutDir: true,
      target: 'es2022',
      chunkSizeWarningLimit: 1000,
    },
  };
});
