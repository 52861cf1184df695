/**
 * Read and validate vlmport.json, here and nowhere else (the twin of
 * vlmport/bundle/manifest_file.py). manifest-types.ts has its types, which are those of
 * vlmport/bundle/manifest.py.
 *
 * All facts about a model that the runtime uses are in it, or in the graphs' inputs and outputs.
 */

import { VlmportError, firstLine } from '../errors.js';
import type { FileEntry, Manifest } from './manifest-types.js';
import { type Json, firstProblem } from './schema.js';
import schema from './vlmport.schema.json' with { type: 'json' };

export type {
  FileEntry,
  Golden,
  GoldenExpectation,
  ImageOptions,
  Manifest,
  Variant,
} from './manifest-types.js';

export const MANIFEST = 'vlmport.json';
export const VERSION = 1;
export const CHUNK_BYTES = 8 * 1024 * 1024;
/** The one layout that is supported here, and the components that it needs. */
const HUB = 'hub';
const NEEDED = ['image_processor', 'vision_encoder', 'embed_tokens', 'decoder_model_merged'];
export const ANY = 'any'; // the precision of a component with one form only

/** A message of a chat, its parts without images. */
export interface Message {
  readonly role: string;
  readonly content: string | readonly { readonly type: string; readonly text?: string }[];
}

/** Read and validate vlmport.json. Throws BundleError. */
export function parseManifest(text: string, where: string): Manifest {
  const again = 'export or upload the bundle again';
  let raw: Json;
  try {
    raw = JSON.parse(text) as Json;
  } catch (error) {
    throw new VlmportError(
      'BundleError',
      'source.not-json',
      `${where}: not JSON: ${firstLine(error)}`,
      again,
    );
  }
  const version = typeof raw === 'object' && raw !== null && 'version' in raw ? raw.version : null;
  if (typeof version === 'number' && version > VERSION) {
    const message = `${where}: manifest version ${version}, but this @vlmport/web reads versions up to ${VERSION}`;
    throw new VlmportError('BundleError', 'bundle.newer-version', message, 'update @vlmport/web');
  }
  const layout = typeof raw === 'object' && raw !== null && 'layout' in raw ? raw.layout : HUB;
  if (layout !== HUB) {
    const message = `${where}: the layout is '${String(layout)}', expected '${HUB}'`;
    throw new VlmportError(
      'BundleError',
      'bundle.other-layout',
      message,
      'write it with `vlmport export SRC OUT`',
    );
  }
  const problem = firstProblem(raw, schema, 'manifest');
  if (problem !== null)
    throw new VlmportError('BundleError', 'bundle.malformed', `${where}: ${problem}`, again);
  const manifest = raw as unknown as Manifest;
  const problems = badReferences(manifest);
  if (problems.length) {
    throw new VlmportError(
      'BundleError',
      'bundle.malformed',
      `${where}: ${problems.join('; ')}`,
      again,
    );
  }
  return manifest;
}

/**
 * List the problems that a schema can't express: files that are not listed, missing chunks, choices
 * that do not exist.
 */
function badReferences(manifest: Manifest): string[] {
  const absent = NEEDED.filter(name => !Object.hasOwn(manifest.components, name));
  const problems = absent.map(name => `layout ${HUB}: no component ${name}`);
  for (const [component, forms] of Object.entries(manifest.components)) {
    for (const name of Object.values(forms).flatMap(form => [form.model, ...form.data])) {
      if (!Object.hasOwn(manifest.files, name))
        problems.push(`${component}: ${name} is not in files`);
    }
  }
  for (const [name, entry] of Object.entries(manifest.files)) {
    const wanted = Math.ceil(entry.size / CHUNK_BYTES);
    if (entry.chunks.length !== wanted) {
      problems.push(`${name}: ${entry.chunks.length} chunk hashes, expected ${wanted}`);
    }
  }
  for (const [device, choice] of Object.entries(manifest.auto)) {
    for (const [component, precision] of Object.entries(choice)) {
      const forms = manifest.components[component] ?? {};
      if (!Object.hasOwn(forms, precision) && !(ANY in forms)) {
        problems.push(`auto.${device}: no ${component} in ${precision}`);
      }
    }
  }
  return problems;
}

/** Return the entry of a file. Throws BundleError where the manifest does not list it. */
export function entryOf(manifest: Manifest, path: string): FileEntry {
  const entry = manifest.files[path];
  if (entry !== undefined) return entry;
  throw new VlmportError(
    'BundleError',
    'bundle.malformed',
    `${path} is not in the bundle`,
    'export the bundle again',
  );
}
