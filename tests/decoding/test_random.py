"""The random stream: the published generator, fair draws, and no last bit that matters."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from vlmport.runtime.decoding import rng as ours
from vlmport.runtime.decoding.rng import (
    draw,
    draw_several,
    new_seed,
    next_word,
    stream,
    uniform,
    weights,
)
from vlmport.runtime.decoding.score_rows import best


def test_the_generator_is_the_published_one():
    """The vector that the crate rand_xoshiro tests its Xoshiro128StarStar with."""
    state, words = (1, 2, 3, 4), []
    for _ in range(10):
        word, state = next_word(state)
        words.append(word)
    assert words == [
        *(11520, 0, 5927040, 70819200, 2031721883),
        *(1637235492, 1287239034, 3734860849, 3729100597, 4258142804),
    ]


def test_each_sequence_of_each_seed_has_its_own_stream():
    states = [stream(seed, n) for seed in [*range(200), 2**32 - 1] for n in range(64)]
    assert len(set(states)) == len(states)
    assert all(any(state) for state in states)  # all zeros would stay zeros
    assert all(0 <= word < 2**32 for state in states for word in state)


def test_uniform_numbers_have_53_bits_and_are_uniform():
    state, numbers = stream(0, 0), []
    for _ in range(20_000):
        number, state = uniform(state)
        numbers.append(number)
    assert all(0 <= number < 1 and (number * 2**53).is_integer() for number in numbers)
    assert any(int(number * 2**53) % 2 for number in numbers)  # the lowest bit is used
    counts = np.histogram(numbers, 64, (0, 1))[0]
    chi_squared = ((counts - 312.5) ** 2 / 312.5).sum()
    assert 30 < chi_squared < 110  # 63 degrees of freedom: outside once in 10,000 seeds


def test_tokens_are_drawn_as_often_as_their_probability_says():
    scores = np.array([0.0, 1.0, -np.inf, 2.0, -1.5, 1.0], np.float32)
    expected = np.exp(scores) / np.exp(scores).sum() * 30_000
    state, counts = stream(7, 0), np.zeros(6)
    for _ in range(30_000):
        token, state = draw(scores, state)
        counts[token] += 1
    assert counts[2] == 0
    possible = expected > 0
    chi_squared = ((counts - expected)[possible] ** 2 / expected[possible]).sum()
    assert chi_squared < 23  # 4 degrees of freedom


def test_several_are_drawn_each_among_those_that_are_left():
    scores = np.log(np.array([0.5, 0.3, 0.15, 0.05])).astype(np.float32)
    parts = np.exp(scores.astype(float))
    state, counts = stream(3, 0), dict.fromkeys(itertools.permutations(range(4), 2), 0)
    for _ in range(20_000):
        drawn, state = draw_several(scores, 2, state)
        counts[drawn[0], drawn[1]] += 1
    expected = {(a, b): 20_000 * parts[a] * parts[b] / (1 - parts[a]) for a, b in counts}
    chi_squared = sum((counts[pair] - expected[pair]) ** 2 / expected[pair] for pair in counts)
    assert chi_squared < 36  # 11 degrees of freedom


@pytest.mark.parametrize("weight", [2.0**32, 4.0])  # small ones meet each other's edges
def test_drawing_several_is_drawing_one_after_the_other(
    weight: float, monkeypatch: pytest.MonkeyPatch
):
    """The quick way with one running sum equals the plain one, in which drawn weights become 0."""
    monkeypatch.setattr(ours, "WEIGHT", weight)
    random = np.random.default_rng(0)
    for seed in range(200):
        scores = (random.standard_normal(30) * random.choice([0.1, 3, 12])).astype(np.float32)
        state = stream(seed, 0)
        places, left = weights(scores)
        plain = []
        for _ in range(min(12, len(places))):
            number, state = uniform(state)
            ahead = np.floor(number * left.sum())
            at = int((np.cumsum(left) > ahead).argmax())
            plain.append(int(places[at]))
            left[at] = 0
        drawn, after = draw_several(scores, 12, stream(seed, 0))
        assert drawn[: len(plain)] == plain
        assert after == state
        assert len(set(drawn)) == 12


def test_without_weights_left_the_best_follow():
    scores = np.array([-50.0, 3.0, -60.0, -50.0, -np.inf, 2.0], np.float32)
    drawn, state = draw_several(scores, 6, stream(1, 0))
    assert set(drawn[:2]) == {1, 5}
    assert drawn[2:] == [0, 3, 2, 4]
    assert state == draw_several(scores, 2, stream(1, 0))[1]  # and take no numbers


def test_weights_are_whole_and_sum_exactly():
    scores = np.random.default_rng(0).standard_normal(200_000).astype(np.float32)
    places, weighty = weights(scores)
    assert weighty.max() == 2**32
    assert (weighty == np.floor(weighty)).all()
    exact = sum(int(one) for one in weighty)
    assert exact < 2**53
    assert weighty.sum() == np.cumsum(weighty)[-1] == weighty[::-1].sum() == exact
    assert len(places) == len(weighty) == 200_000
    assert weights(np.array([0, -22.1, -22.3, -40], np.float32))[0].tolist() == [0, 1]


def test_a_last_bit_of_exp_changes_no_draw(monkeypatch: pytest.MonkeyPatch):
    random = np.random.default_rng(0)
    rows = (random.standard_normal((300, 400)) * 3).astype(np.float32)
    drawn = [draw_several(row, 5, stream(n, 0))[0] for n, row in enumerate(rows)]
    exp = np.exp
    off = random.choice([-np.inf, np.inf], 400)

    def other_exp(values: np.ndarray) -> np.ndarray:
        return np.nextafter(exp(values), off[: len(values)])

    monkeypatch.setattr(ours.np, "exp", other_exp)
    assert drawn == [draw_several(row, 5, stream(n, 0))[0] for n, row in enumerate(rows)]


def test_seeds_that_nobody_gave_differ():
    assert len({new_seed() for _ in range(20)}) > 15
    assert all(0 <= new_seed() < 2**32 for _ in range(100))


@pytest.mark.parametrize("count", [1, 3, 7, 8, 20])
def test_the_best_are_those_of_a_stable_sort(count: int):
    random = np.random.default_rng(0)
    for _ in range(100):
        scores = random.integers(-3, 3, 8).astype(np.float32)
        scores[scores == 2] = -np.inf
        expected = sorted(range(8), key=lambda n: (-scores[n], n))[:count]
        assert best(scores, count).tolist() == expected
