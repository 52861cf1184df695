/** Choose the precisions of a bundle's components (the twin of vlmport/bundle/precisions.py). */

import { VlmportError, didYouMean } from '../errors.js';
import { ANY, type Manifest, type Variant } from './manifest.js';

const AUTO = 'auto';
const NAMES = ['fp32', 'fp16', 'q8', 'q4', 'q4f16'];

/** Other names of precisions. */
const ALIASES: ReadonlyMap<string, string> = new Map([['int8', 'q8']]);

/** Short names in a mixed precision such as 'vision=q4,decoder=fp32'. */
const SHORT_NAMES: ReadonlyMap<string, string> = new Map([
  ['vision', 'vision_encoder'],
  ['embed', 'embed_tokens'],
  ['decoder', 'decoder_model_merged'],
]);

/** Component → precision. */
export type Choice = Readonly<Record<string, string>>;

/** Return the canonical name of a precision; an unknown one only loses its blanks. */
function canonical(name: string): string {
  return ALIASES.get(name.trim()) ?? name.trim();
}

/**
 * Choose a precision for each component: 'auto', 'fp32', 'int8', or 'vision=q4,…'.
 *
 * Throws BundleError for a precision or component that the bundle lacks.
 */
export function choose(manifest: Manifest, precision: string, device: string): Choice {
  const names = Object.keys(manifest.components);
  const all = (value: string) => Object.fromEntries(names.map(name => [name, value]));
  const standard = { ...all(ANY), ...(manifest.auto[device] ?? manifest.auto.cpu) };
  const wanted = canonical(precision);
  let chosen: Choice = wanted === AUTO ? standard : all(wanted);
  if (wanted.includes('=')) chosen = { ...standard, ...parseMix(names, wanted) };
  return Object.fromEntries(names.map(name => [name, check(manifest, name, chosen[name] ?? ANY)]));
}

function parseMix(known: readonly string[], text: string): Choice {
  const pairs = text.replaceAll(' ', '').split(',');
  return Object.fromEntries(
    pairs.map(pair => {
      const [short = '', value = ''] = pair.split('=');
      const name = SHORT_NAMES.get(short) ?? short;
      if (known.includes(name)) return [name, canonical(value)];
      const near = didYouMean(name, [...SHORT_NAMES.keys(), ...known]);
      const message = `precision '${text}': no component '${name}'${near}`;
      const hint = `components of this bundle: ${known.join(', ')}`;
      throw new VlmportError('BundleError', 'precision.unknown', message, hint);
    }),
  );
}

function check(manifest: Manifest, component: string, precision: string): string {
  const forms = manifest.components[component] ?? {};
  if (Object.hasOwn(forms, precision)) return precision;
  if (ANY in forms) return ANY;
  const held = Object.keys(forms);
  const message = `precision '${precision}' is not in this bundle (component ${component})`;
  // An export replaces the bundle, so its present precisions have to be named again.
  const all = NAMES.filter(name => name === precision || complete(manifest).includes(name));
  const again = `; to add it, export again with --precision ${all.join(',')}`;
  throw new VlmportError(
    'BundleError',
    'precision.not-in-bundle',
    message + didYouMean(precision, held),
    `it has ${held.join(', ')}${NAMES.includes(precision) ? again : ''}`,
  );
}

/** List the precisions in which every component exists. */
function complete(manifest: Manifest): string[] {
  const components = Object.values(manifest.components);
  return NAMES.filter(name => components.every(forms => name in forms || ANY in forms));
}

/** Return the files of a component at the chosen precision. */
export function variantOf(manifest: Manifest, choice: Choice, component: string): Variant {
  const variant = manifest.components[component]?.[choice[component] ?? ANY];
  if (variant !== undefined) return variant;
  const message = `this bundle has no ${component}`;
  throw new VlmportError('BundleError', 'bundle.malformed', message, 'export the bundle again');
}

/** Return one name where all components have the same precision, else 'component=precision,…'. */
export function precisionName(choice: Choice): string {
  const chosen = Object.entries(choice).filter(([, value]) => value !== ANY);
  const values = new Set(chosen.map(([, value]) => value));
  if (values.size === 1) return [...values][0] ?? ANY;
  return chosen.map(([name, value]) => `${name}=${value}`).join(',');
}
