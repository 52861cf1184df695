"""A chat template that would never end, or fill all memory, is stopped with a reason."""

from __future__ import annotations

import time
from pathlib import Path

import jinja2
import pytest
from jinja2.sandbox import ImmutableSandboxedEnvironment

from tests.fuzz.bounds import HangError, bounded
from vlmport import chat_template
from vlmport.bundle import PromptSpec
from vlmport.chat_template import CHARACTERS, render_template
from vlmport.errors import PromptError
from vlmport.runtime.prompt import Prompter

MANY = "{% for a in range(99999) %}"
END = "{% endfor %}"
ENDLESS = [
    MANY * 3 + END * 3,
    MANY + "{% for b in range(99999) if false %}{% endfor %}" + END,
    "{% for a in range(99999) recursive %}{% if loop.depth < 4 %}{{ loop(range(99999)) }}"
    "{% endif %}" + END,
    "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(99) }}",
    "{% macro f(n) %}{{ caller() }}{% if n %}{% call f(n - 1) %}{% endcall %}"
    "{% call f(n - 1) %}{% endcall %}{% endif %}{% endmacro %}{% call f(99) %}{% endcall %}",
]
TEXT = "{% set n = namespace(x='text') %}" + MANY
HUGE = [
    "{{ 'text' * 99999999 * 99 }}",
    "{{ [1] * 99999999 * 99 }}",
    "{{ 99 * ('text' * 9999999) }}",
    "{{ 7 ** 99999999 ** 9 }}",
    "{{ '%9999999999d' % 1 }}",
    "{{ '%*d' % (9999999999, 1) }}",
    "{{ '%9999999999d' | format(1) }}",
    "{{ '{:9999999999}'.format(1) }}",
    "{{ 'text'.center(9999999999) }}",
    "{{ 'text' | center(9999999999) }}",
    "{{ messages | tojson(indent=9999999999) }}",
    "{{ [1] | batch(9999999999, 'text') | list }}",
    TEXT + "{% set n.x = n.x + n.x %}" + END,
    TEXT + "{% set n.x = n.x ~ n.x %}" + END,
    TEXT + "{% set n.x = [n.x, n.x] | join %}" + END,
    TEXT + "{% set x %}{{ n.x }}{{ n.x }}{% endset %}{% set n.x = x %}" + END,
    TEXT + "{{ 'text' * 999 }}" + END,
    "{% macro f() %}" + MANY + "text" * 999 + END + "{% endmacro %}{{ f() }}",
    "{% macro f() %}" + MANY + "{{ '" + "text" * 999 + "' }}" + END + "{% endmacro %}{{ f() }}",
    "{{ lipsum(n=99999999) }}",
]
# Each value by itself is small, or what an operation is given is.
NESTED = "{% set n = namespace(x='text') %}{% for a in range(60) %}{% set n.x = WHAT %}{% endfor %}"
GROWING = [
    *(
        NESTED.replace("WHAT", what) + shown
        for what in ("[n.x, n.x]", "(n.x, n.x)", "{'a': n.x, 'b': n.x}", "dict(a=n.x, b=n.x)")
        for shown in ("{{ n.x }}", "{{ n.x ~ 1 }}", "{{ n.x | string | length }}")
    ),
    "{% set n = namespace(x=[]) %}" + MANY + "{% set n.x = [n.x, a ~ 'x' * 9999999] %}" + END,
    "{% set y = 'x' * 9999999 %}{% set n = namespace(x=[]) %}"
    + MANY + "{% set n.x = [n.x, y[1:]] %}" + END,
    "{{ ('a' * 4000).replace('a', 'b' * 9999999) | length }}",
    "{{ ('a' * 4000) | replace('a', 'b' * 9999999) | length }}",
    "{{ ('\t' * 4000).expandtabs(9999999) | length }}",
    "{{ ('a' * 4000).translate({97: 'b' * 9999999}) | length }}",
    "{{ ('a\n' * 4000) | indent(9999999) | length }}",
    "{{ ([1] * 4000) | tojson(indent=9999999) | length }}",
    "{{ (('%9999999d' * 4000) % ((1,) * 4000)) | length }}",
    "{{ (('%(a)s' * 4000) % {'a': 'b' * 9999999}) | length }}",
    "{{ ('{0:{1}}' * 4000).format(1, 9999999) | length }}",
    "{{ ('{0}' * 4000).format('b' * 9999999) | length }}",
    "{{ (['b' * 9999999] * 4000) | join | length }}",
    "{{ ([''] * 4000) | join('b' * 9999999) | length }}",
    "{{ ('b' * 9999999).join([''] * 4000) | length }}",
    "{{ ('b' * 9999999).join('a' * 4000) | length }}",
    "{{ ('a' * 4000) | join('b' * 9999999) | length }}",
    "{{ ('b' * 9999999).join(range(4000) | map('string')) | length }}",
    "{{ range(4000) | map(attribute='no', default='b' * 9999999) | join | length }}",
    "{{ ('<!---->' * 1999999) | striptags }}",
    "{{ ('a' * 9999999) | wordwrap(1) }}",
    "{{ ([[1, 2]] * 99999) | sum(start=[]) | length }}",
    "{{ 'a'.encode() * 9999999999 }}",
    "{{ (1).to_bytes(9999999999) }}",
]  # fmt: skip


@pytest.mark.parametrize("template", GROWING)
def test_what_grows_out_of_small_things(template: str) -> None:
    with bounded(20, 1 << 30), pytest.raises(jinja2.TemplateError) as caught:
        render_template(template)
    assert any(word in str(caught.value) for word in ("size", "makes values", "unsafe"))


def test_a_namespace_does_not_write_what_it_holds() -> None:
    """It can be given more after a list that it is in was weighed."""
    template = NESTED.replace("WHAT", "namespace(x=[n.x, n.x])") + "{{ n.x.x }}{{ n }}"
    with bounded(20, 1 << 30):
        assert render_template(template) == "[<Namespace>, <Namespace>]<Namespace>"


def test_constants_are_not_computed_while_a_template_is_compiled() -> None:
    template = "{% if false %}" + "{{ 'a' | center(16000000) }}" * 200 + "{% endif %}done"
    with bounded(20, 1 << 30):
        assert render_template(template) == "done"


@pytest.mark.parametrize("template", ENDLESS)
def test_what_never_ends(template: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat_template, "SECONDS", 0.05)
    with bounded(20), pytest.raises(jinja2.TemplateError, match=r"not ended after 0\.05 s"):
        render_template(template)


@pytest.mark.parametrize("template", HUGE)
def test_what_fills_the_memory(template: str) -> None:
    start = time.monotonic()
    with bounded(20, 1 << 30), pytest.raises(jinja2.TemplateError) as caught:
        render_template(template, messages=[{"role": "user"}])
    assert time.monotonic() - start < 20
    assert any(word in str(caught.value) for word in ("size", "writes more", "undefined"))


@pytest.mark.parametrize("template", [ENDLESS[0], HUGE[13]])
def test_these_templates_are_as_bad_as_that(template: str) -> None:
    """In the sandbox alone the clock or the memory ends them."""
    plain = ImmutableSandboxedEnvironment().from_string(template)
    with bounded(1, 1 << 28), pytest.raises((HangError, MemoryError)):
        plain.render()


def test_nothing_in_a_template_stands_for_the_counting() -> None:
    template = "{% set count_step = 1 %}{% set joined = 2 %}{{ 'a' ~ 1 }}{% for a in 'bc' %}{{ a }}"
    assert render_template(template + END) == "a1bc"


@pytest.mark.parametrize(
    ("template", "want"),
    [
        ("{{ 5000000 * 5000000 }}{{ 2 ** 60 }}{{ 2 ** -1 }}", f"25000000000000{2**60}0.5"),
        ("{% set n = namespace(last=99999999999) %}{{ n.last }}", "99999999999"),
        ("{{ x | default(99999999999) }}", "99999999999"),
        ("{{ '%05d' % 7 }}{{ 7 % 4 }}{{ '-' * 3 }}{{ 3 * '+' }}", "000073---+++"),
        ("{% macro f(n) %}{{ n }}{{ caller() }}{% endmacro %}{% call f(1) %}x{% endcall %}", "1x"),
        ("{% for a in 'ab' %}{{ loop.length ~ loop.index ~ a }}{% endfor %}", "21a22b"),
        ("{% block b %}{{ 1 }}{% endblock %}{{ self.b() }}", "11"),
        ("{{ '%d' % 5000000000 }}{{ '%s' % 'é' }}{{ '{}'.format(7) }}", "5000000000é7"),
        ("{{ 'a-b-c'.replace('-', '') }}{{ 'a b' | replace(' ', '+') }}", "abca+b"),
        ("{{ [1, [2]] }}{{ {'a': (1, 2)} }}{{ 'abc'[::-1] }}", "[1, [2]]{'a': (1, 2)}cba"),
        ("{% for a, b in [(1, 2)] %}{{ a + b }}{% endfor %}", "3"),
        ("{{ [1, 2] | join('-') }}{{ '-'.join(['a', 'b']) }}{{ [1, 2] | sum }}", "1-2a-b3"),
        ("{{ 'ab' | join }}{{ 'ab' | join('-') }}{{ '-'.join('ab') }}", "aba-ba-b"),
        ("{{ 'ab' | map('upper') | join('-') }}{{ '-'.join('ab' | map('upper')) }}", "A-BA-B"),
        ("{{ [{'a': 1}, {'a': 2}] | map(attribute='a') | sum }}{{ 'a\nb' | indent(1) }}", "3a\n b"),
        ("{% for a in [] %}x{% else %}{{ 'none' | upper }}{% endfor %}", "NONE"),
    ],
)  # fmt: skip
def test_what_is_counted_means_what_it_did(template: str, want: str) -> None:
    assert render_template(template) == want


def test_a_long_conversation_renders() -> None:
    messages = [{"role": "user", "content": "word " * 200}] * 5000
    template = "{% for m in messages %}{{ m.role + ': ' ~ m.content | trim }}\n{% endfor %}"
    assert len(render_template(template, messages=messages)) > 5_000_000
    with pytest.raises(jinja2.TemplateError, match=f"writes more than {CHARACTERS}"):
        render_template(template, messages=messages * 5)


def test_the_error_that_people_see(bundle, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(chat_template, "SECONDS", 0.05)
    (tmp_path / "tokenizer.json").write_bytes((bundle.folder / "tokenizer.json").read_bytes())
    (tmp_path / "chat_template.jinja").write_text(ENDLESS[0])
    prompter = Prompter(tmp_path, PromptSpec("<image>", 0, 0, ()))
    with pytest.raises(PromptError, match="it has not ended after") as caught:
        prompter.render([])
    assert caught.value.hint
