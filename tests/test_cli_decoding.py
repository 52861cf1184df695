"""The decoding options of the command line are those of the Python functions."""

from __future__ import annotations

import inspect
import json
import re
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import Result
from PIL import Image
from typer.testing import CliRunner

from vlmport import cli
from vlmport.cli.decoding_options import DECODING, as_typed, read_decoding
from vlmport.runtime.decoding.options import CHECKS
from vlmport.runtime.model import VLM

COLORS = {
    "type": "object",
    "properties": {"color": {"enum": ["red", "blue"]}},
    "required": ["color"],
    "additionalProperties": False,
}


@pytest.fixture
def picture(tmp_path: Path) -> str:
    path = tmp_path / "picture.png"
    pixels = np.random.default_rng(0).integers(0, 256, (30, 40, 3), np.uint8)
    Image.fromarray(pixels).save(path)
    return str(path)


def run(*arguments: object) -> Result:
    return CliRunner().invoke(cli.app, [str(one) for one in arguments], catch_exceptions=False)


def texts(bundle: Path, picture: str, **options: Any) -> list[str]:
    with VLM.open(bundle) as vlm:
        caption = vlm.caption(picture, **options)
        return [caption.text, *(one.text for one in caption.alternatives)]


@pytest.mark.parametrize(
    ("arguments", "options"),
    [
        (["--num-beams", 3, "--length-penalty", -1], {"num_beams": 3, "length_penalty": -1.0}),
        (
            ["--num-beams", 4, "--num-return-sequences", 3, "--early-stopping", "never"],
            {"num_beams": 4, "num_return_sequences": 3, "early_stopping": "never"},
        ),
        (
            ["--do-sample", "--seed", 5, "--temperature", 2, "--top-k", 0, "--top-p", 0.9],
            {"do_sample": True, "seed": 5, "temperature": 2.0, "top_k": 0, "top_p": 0.9},
        ),
        (
            ["--do-sample", "--seed", 6, "--min-p", 0.01, "--typical-p", 0.9],
            {"do_sample": True, "seed": 6, "min_p": 0.01, "typical_p": 0.9},
        ),
        (
            ["--repetition-penalty", 1.5, "--no-repeat-ngram-size", 2, "--min-new-tokens", 6],
            {"repetition_penalty": 1.5, "no_repeat_ngram_size": 2, "min_new_tokens": 6},
        ),
        (["--stop-string", "a", "--stop-string", "e"], {"stop_strings": ["a", "e"]}),
        (["--regex", "[ab]{3}"], {"regex": "[ab]{3}"}),
        (["--option", "suppress-tokens=[5, 6]"], {"suppress_tokens": [5, 6]}),
        (
            ["--prompt-lookup-num-tokens", 3, "--max-matching-ngram-size", 1, "-p", "fp32"],
            {"prompt_lookup_num_tokens": 3, "max_matching_ngram_size": 1},
        ),
    ],
    ids=lambda one: str(one[0]) if isinstance(one, list) else "",
)
def test_options_say_the_same_as_in_python(
    tiny_bundle: Path, picture: str, arguments: list[Any], options: dict[str, Any]
) -> None:
    done = run(
        "caption", picture, "-m", tiny_bundle, "-p", "fp32", "--max-new-tokens", 9, *arguments
    )
    assert done.exit_code == 0, done.stderr
    with VLM.open(tiny_bundle, precision="fp32") as vlm:
        caption = vlm.caption(picture, max_new_tokens=9, **options)
    want = [caption, *caption.alternatives]
    assert done.stdout == "".join(f"{one.text}\n" for one in want)


def test_json_holds_what_was_asked_for(tiny_bundle: Path, picture: str, tmp_path: Path) -> None:
    common = ["caption", picture, "-m", tiny_bundle, "-p", "fp32", "--json", "--max-new-tokens", 5]
    beams = json.loads(run(*common, "--num-beams", 3, "--num-return-sequences", 2).stdout)
    assert set(beams) == {
        "image", "caption", "token_ids", "stop_reason", "complete", "score", "timings", "counts",
        "alternatives",
    }  # fmt: skip
    (other,) = beams["alternatives"]
    assert set(other) == {"text", "token_ids", "stop_reason", "complete", "score"}
    assert other["score"] <= beams["score"]
    drawn = json.loads(run(*common, "--do-sample", "--logprobs", 2).stdout)
    assert set(drawn) >= {"seed", "logprobs"}
    assert [one["token"] for one in drawn["logprobs"]] == drawn["token_ids"]
    assert all(len(one["top"]) == 2 for one in drawn["logprobs"])
    again = json.loads(run(*common, "--do-sample", "--seed", drawn["seed"]).stdout)
    assert again["token_ids"] == drawn["token_ids"]  # the seed that was drawn is told


def test_a_schema_comes_from_a_file(tiny_bundle: Path, picture: str, tmp_path: Path) -> None:
    path = tmp_path / "schema.json"
    path.write_text(json.dumps(COLORS), encoding="utf-8")
    common = ["caption", picture, "-m", tiny_bundle, "--max-new-tokens", 60]
    done = run(*common, "--json-schema", path)
    assert json.loads(done.stdout) in ({"color": "red"}, {"color": "blue"})
    assert run(*common, "--json-schema", path, "--stream").stdout == done.stdout
    path.write_text("{", encoding="utf-8")
    for wrong in (path, tmp_path / "absent.json"):
        done = run(*common, "--json-schema", wrong)
        assert (done.exit_code, done.stdout) == (2, "")
        code = "option.not-json" if wrong.exists() else "source.unreadable"
        assert f"error[{code}]: --json-schema {wrong}" in done.stderr
        assert "hint: " in done.stderr


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--top-p", "1.5", "--do-sample"], "--top-p 1.5"),
        (["--temperature", "0.5"], "temperature without --do-sample"),
        (["--num-beams", "2", "--stream"], "several sequences can't be streamed"),
        (["--num-return-sequences", "2"], "--num-return-sequences 2 is more than --num-beams 1"),
        (["--option", "colour=1"], "unknown option 'colour'"),
        (["--option", "bad_words_ids=5,6"], "--option bad_words_ids=5,6: not JSON"),
        (["--option", "colour"], "--option colour: expected NAME=VALUE"),
        (["--option", "=1"], "--option =1: expected NAME=VALUE"),
        (["--num-beams", "2", "--option", "num-beams=3"], "--num-beams is given twice"),
        (["--option", "min_length=2", "--option", "min_length=3"], "min_length is given twice"),
        (["--logprobs", "2"], "--logprobs without --json"),
        (["--regex", "(a"], "--regex '(a'"),
        (["--early-stopping", "soon"], "soon"),
    ],
    ids=str,
)
def test_what_is_wrong_is_said_in_a_line(
    tiny_bundle: Path, picture: str, arguments: list[str], said: str
) -> None:
    done = run("caption", picture, "-m", tiny_bundle, *arguments)
    assert (done.exit_code, done.stdout) == (2, "")
    assert said in done.stderr
    assert "Traceback" not in done.stderr


def test_messages_have_options_as_they_are_typed() -> None:
    for message, typed in {
        "top_p=2.0, expected a number": "--top-p 2.0, expected a number",
        "temperature without do_sample=True": "temperature without --do-sample",
        "skip_special_tokens=False": "--no-skip-special-tokens",
        "early_stopping=True to stop soonest": "--early-stopping true to stop soonest",
        "leave num_beams and num_return_sequences out": "leave --num-beams and "
        "--num-return-sequences out",
        "stop_strings=[''], expected": "--stop-string [''], expected",
        "--option top_k=x: not JSON": "--option top_k=x: not JSON",
        "max_length=5, a stop_top_k=1": "max_length=5, a stop_top_k=1",
        "regex='a=b'": "--regex 'a=b'",
    }.items():
        assert as_typed(message) == typed


def test_every_option_is_one_of_generate() -> None:
    names = {one.name for one in DECODING.params}
    assert names == set(inspect.signature(read_decoding).parameters)
    assert names - {"generation"} <= set(CHECKS)


@pytest.mark.parametrize("command", ["caption", "ask", "chat"])
def test_help_has_sections_with_every_option(command: str) -> None:
    text = run(command, "--help").stdout
    headings = re.findall(r"^(\S[^:\n]*):$", text, re.MULTILINE)
    assert [one for one in headings if one != "Arguments"] == [
        "Options", "Model", "Images", "Length of the answer", "Sampling", "Beam search",
        "Content of the answer", "Speed", "More",
    ]  # fmt: skip
    for parameter in DECODING.params:
        has_it = command != "chat" or parameter.name != "logprobs"  # chat has no --json
        assert (f"\n  {parameter.opts[0]}" in text) == has_it
        assert parameter.help.endswith((".", ")"))


def test_a_default_that_is_left_out_is_said_in_a_line(
    own_bundle_folder: Path, picture: str
) -> None:
    path = own_bundle_folder / "vlmport.json"
    manifest = json.loads(path.read_text(encoding="utf-8"))
    manifest["generation"]["defaults"]["guidance_scale"] = 3.0
    path.write_text(json.dumps(manifest), encoding="utf-8")
    with warnings.catch_warnings():
        warnings.simplefilter("default")  # as outside of tests
        done = run("caption", picture, "-m", own_bundle_folder)
    assert done.exit_code == 0
    said = (
        "warning[option.default-left-out]: generation_config.json: "
        "option guidance_scale=3.0 is not supported; left out"
    )
    assert done.stderr.splitlines() == [said]
