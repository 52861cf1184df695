"""A chat template that would never end, or fill all memory, is stopped with a reason."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import jinja2
import pytest
from jinja2.sandbox import ImmutableSandboxedEnvironment

from tests.fuzz.bounds import HangError, bounded
from tests.runtime.hostile_templates import ENDLESS, HUGE, PRYING
from vlmport.bundle import PromptSpec
from vlmport.errors import PromptError
from vlmport.runtime.prompt import Prompter
from vlmport.text import chat_template, killable
from vlmport.text.chat_template import TemplateLimitError, render_template
from vlmport.text.killable import MESSAGE, StoppedError, Worker

MESSAGES = [{"role": "user"}]
PLAIN = "{{ x }}"


@pytest.fixture(scope="module")
def impatient() -> Iterator[Worker]:
    """Limits that real templates keep a hundred times over."""
    worker = Worker("template", seconds=0.1, memory=64 << 20, answer=1 << 20)
    yield worker
    worker.close()


@pytest.fixture
def own() -> Iterator[Worker]:
    worker = Worker("template", seconds=20)
    yield worker
    worker.close()


@pytest.mark.parametrize("template", ENDLESS, ids=range(len(ENDLESS)))
def test_what_never_ends(template: str, impatient: Worker) -> None:
    with pytest.raises(TemplateLimitError) as caught:
        render_template(template, str, impatient, messages=MESSAGES)
    assert caught.value.code in ("template.too-slow", "template.stopped")
    assert len(str(caught.value)) <= MESSAGE


@pytest.mark.parametrize("template", HUGE, ids=range(len(HUGE)))
def test_what_fills_the_memory(template: str, impatient: Worker) -> None:
    """Jinja or Python refuse some of them, the limits the others."""
    with bounded(20, 256 << 20), pytest.raises(jinja2.TemplateError) as caught:
        render_template(template, str, impatient, messages=MESSAGES)
    assert len(str(caught.value)) <= MESSAGE


@pytest.mark.parametrize("template", PRYING, ids=range(len(PRYING)))
def test_what_pries_or_says_too_much(
    template: str, own: Worker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("A_SECRET", "a-secret-value")
    with bounded(20, 256 << 20):
        try:
            text = render_template(template, str, _shared(own), messages=MESSAGES)
        except jinja2.TemplateError as error:
            text = str(error)
    assert len(text) <= MESSAGE
    assert not any(word in text for word in ("a-secret-value", "root:", "<class", "object at"))


_patient: list[Worker] = []


def _shared(worker: Worker) -> Worker:
    """One process for all of these, which end by themselves."""
    _patient.append(worker)
    return _patient[0]


@pytest.mark.parametrize("template", [ENDLESS[0], HUGE[13]])
def test_these_templates_are_as_bad_as_that(template: str) -> None:
    """In the sandbox alone the clock or the memory ends them."""
    plain = ImmutableSandboxedEnvironment().from_string(template)
    with bounded(1, 1 << 28), pytest.raises((HangError, MemoryError)):
        plain.render()


def test_the_next_template_renders_after_one_was_stopped(own: Worker) -> None:
    own.seconds = 0.1
    with pytest.raises(TemplateLimitError) as caught:
        render_template(ENDLESS[0], str, own)
    assert caught.value.code == "template.too-slow"
    own.seconds = 20
    assert (
        render_template(PLAIN, str, own, x=[1, {"a": "é\ud800\n"}]) == "[1, {'a': 'é\\ud800\\n'}]"
    )


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
        ("{% for a in 'abc' %}{% if loop.last %}{% break %}{% endif %}{{ a }}{% endfor %}", "ab"),
        ("{{ 'ab' | map('upper') | join('-') }}{{ [1, 2] | sum }}", "A-B3"),
        ("{{ {'a': 'é<'} | tojson }}{{ dict(a=1).a }}{{ dict.fromkeys('a') }}",
         '{"a": "é<"}1{\'a\': None}'),
        ("{% set x = 1 %}{% generation %}{{ x }}{% set x = 2 %}{% endgeneration %}{{ x }}", "11"),
        ("{{ strftime_now('%Y') | length }}{{ [1] | pprint }}", "4[1]"),
        ("{{ '<a>&amp;' | striptags }}{{ 'a\nb' | indent }}{{ [7] | random }}", "&a\n    b7"),
    ],
)  # fmt: skip
def test_a_template_means_what_it_does_in_transformers(template: str, want: str) -> None:
    """In place and in the other process alike."""
    assert chat_template.render_here(template, {}) == want
    assert render_template(template) == want


class Danger:
    """An object with a method that writes."""

    def save(self) -> str:
        raise AssertionError("called")


def test_a_template_sees_plain_data_alone() -> None:
    text = (
        "{% for m in messages %}{{ m.role }}{{ m.image }}{{ m.image.save is defined }}{% endfor %}"
    )
    messages = [{"role": "user", "image": Danger()}]
    assert render_template(text, messages=messages) == "user<Danger>False"
    with pytest.raises(jinja2.TemplateError):
        render_template(text, messages=[{("a", "key"): 1}])


def test_a_long_conversation_renders(own: Worker) -> None:
    messages = [{"role": "user", "content": "word " * 200}] * 5000
    template = "{% for m in messages %}{{ m.role + ': ' ~ m.content | trim }}\n{% endfor %}"
    assert len(render_template(template, str, own, messages=messages)) > 5_000_000
    with pytest.raises(TemplateLimitError, match=f"more than {killable.ANSWER} characters"):
        render_template(template, str, own, messages=messages * 4)


def test_known_templates_are_rendered_in_place(
    tiny_bundle: Path, own: Worker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The templates of the built-in models: their first prompt starts no process."""
    folder = Path(chat_template.__file__).parents[1] / "builtin"
    import json

    found = [json.loads(path.read_text()) for path in folder.glob("*/chat_template.json")]
    templates = [one["chat_template"] for one in found]
    templates.append((tiny_bundle / "chat_template.jinja").read_text())
    assert len(templates) == 4
    monkeypatch.setattr(own, "ask", lambda request: pytest.fail("another process"))
    message = {"role": "user", "content": [{"type": "image"}]}
    assert all(render_template(one, str, own, messages=[message]) for one in templates)


def test_threads_share_one_process(own: Worker) -> None:
    told: list[str] = []
    threads = [
        threading.Thread(target=lambda n=n: told.append(render_template(PLAIN, str, own, x=n)))
        for n in range(8)
    ]
    for one in threads:
        one.start()
    for one in threads:
        one.join()
    assert sorted(told) == [str(n) for n in range(8)]


PROGRAM = f"""
import os, signal, sys, threading
from vlmport.text.chat_template import WORKER, render_template
assert render_template("{PLAIN}", x=1) == "1"
first = WORKER._process.pid
if child := os.fork():
    assert os.waitpid(child, 0)[1] == 0
else:
    assert render_template("{PLAIN}", x=2) == "2" and WORKER._process.pid != first
    sys.exit(0)
assert render_template("{PLAIN}", x=3) == "3" and WORKER._process.pid == first
threading.Timer(0.2, lambda: os.kill(os.getpid(), signal.SIGINT)).start()
try:
    render_template({ENDLESS[0]!r})
except KeyboardInterrupt:
    assert WORKER._process is None
assert render_template("{PLAIN}", x=4) == "4"
print(first, WORKER._process.pid)
if "kill" in sys.argv:
    sys.stdout.flush()
    os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.skipif(os.name == "nt", reason="Windows has no fork")
@pytest.mark.parametrize("end", ["exit", "kill"])
def test_forks_and_interrupts_leave_no_process(end: str) -> None:
    done = subprocess.run(
        [sys.executable, "-X", "dev", "-W", "error", "-c", PROGRAM, end],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == (-signal.SIGKILL if end == "kill" else 0), done.stderr
    assert done.stderr == ""
    for pid in done.stdout.split():
        _wait_until_gone(int(pid))


def _wait_until_gone(pid: int) -> None:
    """A process whose input has closed ends by itself."""
    for _ in range(500):
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return
        stat = Path(f"/proc/{pid}/stat")
        if stat.exists() and stat.read_text().rpartition(")")[2].split()[0] == "Z":
            return
        threading.Event().wait(0.02)
    pytest.fail(f"process {pid} is still there")


def test_the_process_has_neither_files_nor_secrets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("A_SECRET", "a-secret-value")
    program = "import os; from vlmport.text.services import restrict; restrict(1 << 28)\n"
    done = subprocess.run(
        [sys.executable, "-c", program + "open(os.devnull)"], capture_output=True, text=True
    )
    if os.name == "posix":
        assert "Too many open files" in done.stderr
    assert "A_SECRET" not in {name for name in os.environ if name in killable.KEPT}


@pytest.mark.parametrize("change", [("frozen", True), ("executable", "/usr/bin/program")])
def test_a_program_that_is_no_python_starts_none(
    change: tuple[str, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It would start itself."""
    monkeypatch.setattr(sys, *change, raising=False)
    worker = Worker("template")
    with pytest.raises(TemplateLimitError) as caught:
        render_template(PLAIN, str, worker)
    assert caught.value.code == "template.stopped"
    with pytest.raises(StoppedError):
        worker.ask({})


def test_the_error_that_people_see(
    tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chat_template.WORKER, "seconds", 0.1)
    (tmp_path / "tokenizer.json").write_bytes((tiny_bundle / "tokenizer.json").read_bytes())
    (tmp_path / "chat_template.jinja").write_text(ENDLESS[0])
    prompter = Prompter(tmp_path, PromptSpec("<image>", 0, 0, ()))
    with pytest.raises(PromptError) as caught:
        prompter.render([])
    assert caught.value.code == "template.too-slow"
    assert caught.value.hint
    monkeypatch.setattr(chat_template.WORKER, "seconds", 20)
    (tmp_path / "chat_template.jinja").write_text("{{ raise_exception('x' * 999) }}")
    with pytest.raises(PromptError) as caught:
        Prompter(tmp_path, PromptSpec("<image>", 0, 0, ())).render([])
    assert caught.value.code == "template.refuses"
    assert len(str(caught.value)) < 2 * MESSAGE
