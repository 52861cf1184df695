/**
 * Builds the demo page; with `--mode test` the bare page of the browser tests; with
 * `--mode standalone` the package as files that need no bundler.
 *
 * The page holds one build of ONNX Runtime, the one with WebGPU: its WebAssembly kernels are the
 * same, and a page that falls back need not fetch a second one. The other two hold both,
 * so that a page without WebGPU fetches the smaller one.
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

/** Puts browser/page/counted.ts around ONNX Runtime, so that tests can count its runs. */
function countedRuntime(): Plugin {
  const OURS = '\0counted:';
  return {
    name: 'counted-runtime',
    enforce: 'pre',
    resolveId(source, importer = '') {
      const inside = source.startsWith('onnxruntime-web/') && !importer.startsWith(OURS);
      return inside ? OURS + source : null;
    },
    load(id) {
      if (!id.startsWith(OURS)) return null;
      const source = JSON.stringify(id.slice(OURS.length));
      return `import { InferenceSession as Real } from ${source};
        import { counted } from ${JSON.stringify(here('browser/page/counted.ts'))};
        export * from ${source};
        export const InferenceSession = counted(Real);`;
    },
  };
}

/** One script that exports what the package does; its worker and ONNX Runtime lie beside it. */
const entry = {
  input: { vlmport: here('dist/index.js') },
  preserveEntrySignatures: 'strict',
  output: { entryFileNames: '[name].js' },
} as const;

export default defineConfig(({ mode }) => {
  const test = mode === 'test';
  const standalone = mode === 'standalone';
  const library = { '@vlmport/web': here('dist/index.js') };
  const oneRuntime = { 'onnxruntime-web/wasm': 'onnxruntime-web/webgpu' };
  const alias = test || standalone ? library : { ...library, ...oneRuntime };
  return {
    root: here(test ? 'browser/page' : 'demo'),
    base: './',
    resolve: { alias },
    worker: { format: 'es', plugins: () => (test ? [countedRuntime()] : []) },
    plugins: test || standalone ? [] : [serviceWorker()],
    build: {
      outDir: here(
        standalone ? 'dist/standalone' : test ? 'browser/built' : '../src/vlmport/web_page',
      ),
      ...(standalone && { rollupOptions: entry }),
      emptyOutDir: true,
      target: 'es2022',
      chunkSizeWarningLimit: 1000,
    },
  };
});
