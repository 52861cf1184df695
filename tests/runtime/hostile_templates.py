"""Chat templates that take time or memory without end, leave the sandbox, or say too much."""

from __future__ import annotations

MANY = "{% for a in range(99999) %}"
END = "{% endfor %}"
TEXT = "{% set n = namespace(x='text') %}" + MANY
NESTED = "{% set n = namespace(x='text') %}{% for a in range(60) %}{% set n.x = WHAT %}{% endfor %}"
MILLION = "{% set y = 'a' * 1000000 %}"
COLLIDING = (
    "{% set n = namespace(x=[]) %}" + MANY + ("{% set n.x = n.x + [a * 2305843009213693951] %}")
)

# Each must be stopped by a limit.
ENDLESS = [
    MANY * 3 + END * 3,
    MANY + "{% for b in range(99999) if false %}{% endfor %}" + END,
    "{% for a in range(99999) recursive %}{% if loop.depth < 4 %}{{ loop(range(99999)) }}"
    "{% endif %}" + END,
    "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(99) }}",
    "{% macro f(n) %}{{ caller() }}{% if n %}{% call f(n - 1) %}{% endcall %}"
    "{% call f(n - 1) %}{% endcall %}{% endif %}{% endmacro %}{% call f(99) %}{% endcall %}",
    "{% set j = joiner(', ') %}" + MANY * 2 + "{{ j() }}" + END * 2,
    "{% set c = cycler('a', 'b') %}" + MANY * 2 + "{% set x = c.next() %}" + END * 2,
    "{{ 7 ** 99999999 ** 9 }}",
    "{{ 1.5 | round(1000000000, 'ceil') }}",
    "{% set y = 'a' * 16000000 %}" + MANY + "{% set x = ('ab' * 9) in y %}" + END,
    "{% set y = 'a' * 16000000 %}" + MANY + "{% set x = y.count('ab') %}" + END,
    MILLION + MANY + "{% set x = y.strip('b' * 1000000) %}" + END,
    MILLION + MANY + "{% set x = y.split('b' * 999) %}" + END,
    "{{ ('<!---->' * 1999999) | striptags }}",
    "{{ ('a' * 9999999) | wordwrap(1) }}",
    "{{ ('a.b ' * 9999999) | urlize }}",
    COLLIDING + END + "{{ n.x | unique | list | length }}",
    COLLIDING + END + "{{ dict.fromkeys(n.x) | length }}",
    "{{ ([[1, 2]] * 99999) | sum(start=[]) | length }}",
    MANY * 2 + "{% set x = strftime_now('%c' * 9999) %}" + END * 2,
    "{% macro f() %}" + MANY * 2 + "{{ 'text' * 99 }}" + END * 2 + "{% endmacro %}{{ f() }}",
]  # fmt: skip
HUGE = [
    "{{ 'text' * 99999999 * 99 }}",
    "{{ [1] * 99999999 * 99 }}",
    "{{ 99 * ('text' * 99999999) }}",
    "{{ '%9999999999d' % 1 }}",
    "{{ '%*d' % (9999999999, 1) }}",
    "{{ '%9999999999d' | format(1) }}",
    "{{ '{:9999999999}'.format(1) }}",
    "{{ 'text'.center(9999999999) }}",
    "{{ 'text' | center(9999999999) }}",
    "{{ messages | tojson(indent=9999999999) }}",
    "{{ [1] | batch(9999999999, 'text') | list }}",
    "{{ range(99999) | list * 9999999 }}",
    TEXT + "{% set n.x = n.x + n.x %}" + END,
    TEXT + "{% set n.x = n.x ~ n.x %}" + END,
    TEXT + "{% set n.x = [n.x, n.x] | join %}" + END,
    TEXT + "{{ 'text' * 999 }}" + END,
    "{{ lipsum(n=99999999) }}",
    *(
        NESTED.replace("WHAT", what) + shown
        for what in ("[n.x, n.x]", "{'a': n.x, 'b': n.x}", "namespace(x=[n.x, n.x])")
        for shown in ("{{ n.x }}", "{{ n.x | string | length }}")
    ),
    "{{ ('a' * 4000).replace('a', 'b' * 9999999) | length }}",
    "{{ ('\t' * 4000).expandtabs(9999999) | length }}",
    "{{ ('a\n' * 4000) | indent(9999999) | length }}",
    "{{ (('%(a)s' * 4000) % {'a': 'b' * 9999999}) | length }}",
    "{{ ('{0:{1}}' * 4000).format(1, 9999999) | length }}",
    "{{ ('b' * 9999999).join(range(4000) | map('string')) | length }}",
    "{{ 'a'.encode() * 9999999999 }}",
    "{{ (1).to_bytes(9999999999) }}",
    "{% if false %}" + "{{ 'a' | center(16000000) }}" * 200 + "{% endif %}",
    "{{ 'a' * 17000000 }}",
]
# Each gives an error of its own, or nothing of what it asks for.
PRYING = [
    "{{ ''.__class__.__mro__ }}",
    "{{ messages.__class__.__base__.__subclasses__() }}",
    "{{ ''['__class__'] }}",
    "{{ '' | attr('__class__') }}",
    "{{ ['x'] | map(attribute='__class__') | list }}",
    "{{ '{0.__class__.__mro__}'.format('') }}",
    "{{ '{a.__class__}'.format_map({'a': ''}) }}",
    "{{ ('{0.__class__}' | attr('format'))('') }}",
    "{{ cycler.__init__.__globals__.os.environ }}",
    "{{ lipsum.__globals__['os'].environ }}",
    "{{ self.__init__.__globals__ }}",
    "{{ namespace(__class__=1) }}",
    "{{ raise_exception.__globals__ }}",
    "{{ strftime_now.__code__ }}",
    "{% set x = ['{0.__init__.__globals__[os].environ}'] | map('format', cycler) | list %}{{ x }}",
    "{% include '/etc/passwd' %}",
    "{% import 'os' as os %}",
    "{% extends 'a' %}",
    "{{ raise_exception('x' * 16000000) }}",
    "{{ raise_exception([['x' * 999] * 99] * 9) }}",
    "{{ messages['x' * 1000000].y.z }}",
    "{{ " + "x" * 100_000 + ".y.z }}",
    "{{ " + "(" * 100_000 + " }}",
    "{% if %}",
]
