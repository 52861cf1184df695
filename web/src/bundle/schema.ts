/**
 * Validate a document by JSON Schema (the part of draft 7 that vlmport.schema.json uses).
 *
 * The browser checks a manifest by the same schema as Python.
 */

export type Json =
  null | boolean | number | string | readonly Json[] | { readonly [key: string]: Json };

interface Schema {
  readonly [keyword: string]: Json;
}

type Rule = (
  value: Json,
  argument: Json,
  schema: Schema,
  check: Check,
  path: string,
) => string | null;
type Check = (value: Json, schema: Schema, path: string) => string | null;

const ANNOTATIONS = new Set(['$schema', 'title', 'description', 'definitions']);

/**
 * Return the first problem of a document, such as "manifest.files.x must be integer"; else null.
 */
export function firstProblem(document: Json, schema: Schema, name: string): string | null {
  const definitions = asObject(schema.definitions ?? {});
  const check: Check = (value, part, path) => {
    if (typeof part.$ref === 'string') {
      return check(value, asObject(definitions[part.$ref.replace('#/definitions/', '')]), path);
    }
    for (const [keyword, argument] of Object.entries(part)) {
      if (ANNOTATIONS.has(keyword)) continue;
      const rule = RULES[keyword];
      if (rule === undefined) throw new Error(`schema keyword ${keyword} is not supported`);
      const problem = rule(value, argument, part, check, path);
      if (problem !== null) return problem;
    }
    return null;
  };
  return check(document, schema, name);
}

const RULES: Record<string, Rule> = {
  type: (value, names, _, __, path) => {
    const allowed = (Array.isArray(names) ? names : [names]) as readonly string[];
    const found = typeOf(value);
    const fits = allowed.includes(found) || (found === 'integer' && allowed.includes('number'));
    return fits ? null : `${path} must be ${allowed.join(' or ')}, got ${found}`;
  },
  const: (value, wanted, _, __, path) =>
    value === wanted ? null : `${path} must be ${JSON.stringify(wanted)}`,
  enum: (value, allowed, _, __, path) =>
    asArray(allowed).includes(value) ? null : `${path} must be one of ${JSON.stringify(allowed)}`,
  minimum: (value, least, _, __, path) =>
    typeof value !== 'number' || value >= Number(least)
      ? null
      : `${path} must be at least ${least}`,
  maximum: (value, most, _, __, path) =>
    typeof value !== 'number' || value <= Number(most) ? null : `${path} must be at most ${most}`,
  exclusiveMinimum: (value, least, _, __, path) =>
    typeof value !== 'number' || value > Number(least)
      ? null
      : `${path} must be greater than ${least}`,
  minLength: (value, least, _, __, path) =>
    typeof value !== 'string' || value.length >= Number(least) ? null : `${path} is too short`,
  pattern: (value, pattern, _, __, path) =>
    typeof value !== 'string' || new RegExp(String(pattern)).test(value)
      ? null
      : `${path} must match ${pattern}`,
  minItems: (value, least, _, __, path) =>
    !Array.isArray(value) || value.length >= Number(least) ? null : `${path} has too few items`,
  maxItems: (value, most, _, __, path) =>
    !Array.isArray(value) || value.length <= Number(most) ? null : `${path} has too many items`,
  uniqueItems: (value, _, __, ___, path) =>
    !Array.isArray(value) || new Set(value.map(one => JSON.stringify(one))).size === value.length
      ? null
      : `${path} has an item twice`,
  items: (value, schema, _, check, path) =>
    Array.isArray(value)
      ? first(value.entries(), ([index, item]) =>
          check(item, asObject(schema), `${path}[${index}]`),
        )
      : null,
  minProperties: (value, least, _, __, path) =>
    !isObject(value) || Object.keys(value).length >= Number(least) ? null : `${path} is empty`,
  required: (value, names, _, __, path) =>
    isObject(value)
      ? first(asArray(names), name => (String(name) in value ? null : `${path}.${name} is missing`))
      : null,
  properties: (value, schemas, _, check, path) =>
    isObject(value)
      ? first(Object.entries(asObject(schemas)), ([name, schema]) => {
          const item = value[name];
          return item === undefined ? null : check(item, asObject(schema), `${path}.${name}`);
        })
      : null,
  patternProperties: (value, schemas, _, check, path) =>
    isObject(value)
      ? first(Object.entries(asObject(schemas)), ([pattern, schema]) =>
          first(Object.entries(value), ([name, item]) =>
            new RegExp(pattern).test(name)
              ? check(item, asObject(schema), `${path}.${name}`)
              : null,
          ),
        )
      : null,
  additionalProperties: (value, allowed, schema, check, path) => {
    if (!isObject(value) || allowed === true) return null;
    const named = asObject(schema.properties ?? {});
    const patterns = Object.keys(asObject(schema.patternProperties ?? {}));
    return first(Object.entries(value), ([name, item]) => {
      if (name in named || patterns.some(pattern => new RegExp(pattern).test(name))) return null;
      if (allowed === false) return `${path}.${name} is unknown`;
      return check(item, asObject(allowed), `${path}.${name}`);
    });
  },
};

function first<T>(items: Iterable<T>, problemOf: (item: T) => string | null): string | null {
  for (const item of items) {
    const problem = problemOf(item);
    if (problem !== null) return problem;
  }
  return null;
}

function typeOf(value: Json): string {
  if (value === null) return 'null';
  if (Array.isArray(value)) return 'array';
  if (typeof value === 'number') return Number.isInteger(value) ? 'integer' : 'number';
  return typeof value;
}

function isObject(value: Json | undefined): value is { readonly [key: string]: Json } {
  return typeof value === 'object' && value !== null && !Array.isArray(value);
}

function asObject(value: Json | undefined): Schema {
  if (!isObject(value)) throw new Error('the schema itself is malformed');
  return value;
}

function asArray(value: Json): readonly Json[] {
  return value as readonly Json[];
}
