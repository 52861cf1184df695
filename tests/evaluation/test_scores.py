"""The libraries are asked as they should be: known figures, any tokenization trap said."""

from __future__ import annotations

import importlib.util

import pytest

from tests.errors import raises
from vlmport.errors import DependencyError, EvaluationError, OptionError
from vlmport.evaluation.caption_scores import METRICS, cider_d, exact_match, parse_metrics, rouge_l


def test_exact_match_is_to_the_letter() -> None:
    assert exact_match(["a b", "A b", "c"], [["x", "a b"], ["a b"], ["c."]]) == [1, 0, 0]


def test_rouge_l_is_the_best_f1() -> None:
    """'the cat sat': 3 of 4 given words in order, of 3 and of 6 in the references."""
    given = ["the cat there sat"]
    assert rouge_l(given, [["the cat sat"]]) == pytest.approx([2 * 3 / (4 + 3)])
    assert rouge_l(given, [["the cat sat on the mat"]]) == pytest.approx([2 * 3 / (4 + 6)])
    both = [["the cat sat on the mat", "the cat sat"]]
    assert rouge_l(given, both) == pytest.approx([6 / 7])
    assert rouge_l(["THE CAT, SAT!"], [["the cat sat"]]) == [1.0]
    assert rouge_l([""], [["the cat sat"]]) == [0.0]
    assert rouge_l(["cats"], [["cat"]]) == [0.0]  # no stemming


def test_rouge_l_of_another_script_is_refused() -> None:
    """rouge-score would give 0 for a caption that is right."""
    with raises(EvaluationError, "metric.not-applicable", "1", "'犬が走る'") as caught:
        rouge_l(["犬が走る", "a"], [["犬が走る"], ["a"]])
    assert "cider-d" in str(caught.value.hint)


REFERENCES = [
    ["a man rides a brown horse on the beach", "a person on a horse by the sea"],
    ["two dogs play in the snow", "dogs running through deep snow"],
    ["a plate of food on a table"],
]


def test_cider_d_is_cocos() -> None:
    """10 for the reference itself, where there is one; between, by how rare the words are."""
    given = ["two dogs play in the snow", "a plate of food on a table"]
    scores = cider_d(["a man on a horse", *given], REFERENCES)
    assert scores[2] == pytest.approx(10)
    assert 0 < scores[0] < scores[1] < 10
    assert cider_d(["nothing of it", *given], REFERENCES)[0] == 0
    assert cider_d(["犬 が 走る", "猫"], [["犬 が 走る"], ["猫 だ"]])[0] > 5


def test_cider_d_reads_words_as_coco_does() -> None:
    """In lower case and without punctuation."""
    plain = cider_d(["a man s horse", "two dogs", "a plate"], REFERENCES)
    marked = cider_d(["A man, s horse...", "Two dogs!", "a plate ?"], REFERENCES)
    assert marked == pytest.approx(plain)


def test_cider_d_of_one_picture_means_nothing() -> None:
    with raises(EvaluationError, "metric.not-applicable", "CIDEr-D", "0"):
        cider_d(["a"], [["a"]])


def test_metrics_by_name() -> None:
    names = ["rouge-l", "ROUGE_L", " cider-d", "exact_match"]
    assert [one.name for one in parse_metrics(names)] == ["rouge_l", "cider_d", "exact_match"]
    with raises(OptionError, "option.wrong-value", "'rogue_l'", "'rouge_l'?)"):
        parse_metrics(["rogue-l"])
    with raises(OptionError, "option.wrong-value", "'meteor'"):
        parse_metrics(["METEOR"])


@pytest.mark.parametrize(
    ("metric", "extra"), [("rouge_l", "vlmport[eval]"), ("cider_d", "vlmport[cider]")]
)
def test_a_missing_library_names_its_extra(
    monkeypatch: pytest.MonkeyPatch, metric: str, extra: str
) -> None:
    found = importlib.util.find_spec
    gone = METRICS[metric].modules[-1]
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == gone else found(name)
    )
    with raises(DependencyError, "dependency.missing", gone) as caught:
        parse_metrics([metric])
    assert extra in str(caught.value.hint)
    parse_metrics(["exact-match"])
