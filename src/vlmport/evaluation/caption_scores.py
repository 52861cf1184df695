"""Score captions with the libraries whose numbers the field compares.

| metric | by | tokens |
| --- | --- | --- |
| `exact_match` | one of the reference captions, to the letter | none |
| `rouge_l` | rouge-score (Google): F1 of the longest common subsequence, best reference | its own |
| `cider_d` | pycocoevalcap (COCO's): n-grams weighted by rarity, length penalty | NLTK's |

Trap: COCO's own tokenizer is a Java program. NLTK's Treebank tokenizer, lower case and without
COCO's list of punctuation, replaces it: figures of other programs may differ in the last digits.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from vlmport.errors import (
    DependencyError,
    EvaluationError,
    OptionError,
    did_you_mean,
    quoted,
    some_names,
)

References = Sequence[Sequence[str]]


@dataclass(frozen=True)
class Metric:
    """One way to judge captions.

    Attributes:
        title: the heading in tables, for the mean over all images times 100.
        judged: whether its loss by rounding has a limit: a share has one, CIDEr-D is no share.
        modules, extra: the libraries that it needs, and the extra of vlmport that installs them.
        score: captions [N], references [N][several] → [N] scores. Raises EvaluationError.
    """

    name: str
    title: str
    judged: bool
    modules: tuple[str, ...]
    extra: str
    score: Callable[[Sequence[str], References], list[float]]


def exact_match(captions: Sequence[str], references: References) -> list[float]:
    """Score 1 where the caption is one of its references, else 0."""
    return [float(one in right) for one, right in zip(captions, references, strict=True)]


def rouge_l(captions: Sequence[str], references: References) -> list[float]:
    """Score F1 against the best reference, 0 … 1, by rouge-score's defaults (no stemming)."""
    from rouge_score.rouge_scorer import RougeScorer
    from rouge_score.tokenizers import DefaultTokenizer

    tokens = DefaultTokenizer(use_stemmer=False).tokenize
    if blank := [text for texts in references for text in texts if not tokens(text)]:
        raise EvaluationError(
            f"ROUGE-L reads the letters a to z and digits only, and {len(blank)} reference "
            f"captions have none: {some_names(blank, limit=3)}",
            hint="measure another script with --metric cider-d",
            code="metric.not-applicable",
        )
    scorer = RougeScorer(["rougeL"])
    return [
        float(scorer.score_multi(right, one)["rougeL"].fmeasure)
        for one, right in zip(captions, references, strict=True)
    ]


def cider_d(captions: Sequence[str], references: References) -> list[float]:
    """Score CIDEr-D as COCO does, 0 … 10; the references tell how rare words are."""
    from nltk.tokenize import TreebankWordTokenizer
    from pycocoevalcap.cider.cider import Cider
    from pycocoevalcap.tokenizer.ptbtokenizer import PUNCTUATIONS

    if len(captions) < 2:
        raise EvaluationError(
            "CIDEr-D of one image is 0 by definition: it counts how rare words are",
            hint="give more images, or choose --metric rouge-l",
            code="metric.not-applicable",
        )
    split = TreebankWordTokenizer().tokenize

    def tokens(text: str) -> str:
        return " ".join(word for word in split(text.lower()) if word not in PUNCTUATIONS)

    right = {n: [tokens(text) for text in texts] for n, texts in enumerate(references)}
    given = {n: [tokens(text)] for n, text in enumerate(captions)}
    _, each = Cider().compute_score(right, given)
    return [float(score) for score in each]


_ALL = (
    Metric("exact_match", "exact match %", True, (), "", exact_match),
    Metric("rouge_l", "ROUGE-L", True, ("rouge_score",), "eval", rouge_l),
    Metric("cider_d", "CIDEr-D", False, ("nltk", "pycocoevalcap"), "cider", cider_d),
)
METRICS = {metric.name: metric for metric in _ALL}


def parse_metrics(names: Sequence[str]) -> tuple[Metric, ...]:
    """Find metrics by their names, 'rouge-l' or 'rouge_l', each once.

    Raises OptionError for an unknown name, DependencyError for a library that is missing.
    """
    metrics = []
    for name in dict.fromkeys(one.strip().lower().replace("-", "_") for one in names):
        if name not in METRICS:
            raise OptionError(
                f"no metric {quoted(name)}{did_you_mean(name, METRICS)}",
                hint=f"choose from {', '.join(METRICS).replace('_', '-')}",
                code="option.wrong-value",
            )
        metrics.append(METRICS[name])
    for metric in metrics:
        if missing := [one for one in metric.modules if importlib.util.find_spec(one) is None]:
            raise DependencyError(
                f"{metric.title} needs {' and '.join(missing)}, not installed here",
                hint=f'pip install "vlmport[{metric.extra}]"',
                code="dependency.missing",
            )
    return tuple(metrics)
