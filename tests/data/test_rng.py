"""Philox against Random123's published answers; the keyed shuffle as a bijection of good quality."""

from __future__ import annotations

import math
import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chisquare

from fastav.data import rng as draw
from fastav.data.rng import MAX_PERMUTE, permute, philox4x32, split_words, uniform

ONES = 0xFFFFFFFF
# Random123's kat_vectors, "philox4x32 10": counter, key, answer.
KNOWN_ANSWERS = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((ONES,) * 4, (ONES,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]
SIZES = st.one_of(st.integers(1, 10**9), st.integers(1, 40).map(lambda b: 1 << b), st.integers(1, MAX_PERMUTE))
KEYS = st.integers(0, 2**64 - 1)


@pytest.mark.parametrize(("counter", "key", "answer"), KNOWN_ANSWERS)
def test_philox_known_answers(counter, key, answer):
    assert tuple(int(word) for word in philox4x32(counter, key)) == answer


def test_philox_is_the_same_for_arrays_and_broadcasts():
    counters, keys = zip(*((counter, key) for counter, key, _ in KNOWN_ANSWERS), strict=True)
    words = philox4x32(tuple(np.array(counters).T), tuple(np.array(keys).T))
    np.testing.assert_array_equal(words, np.array([answer for *_, answer in KNOWN_ANSWERS]).T)
    grid = philox4x32((np.arange(5), 1, np.arange(3)[:, None], 2), (7, np.arange(5)))
    assert grid.shape == (4, 3, 5)
    for i in range(3):
        for j in range(5):
            np.testing.assert_array_equal(grid[:, i, j], philox4x32((j, 1, i, 2), (7, j)))


def test_philox_words_of_consecutive_counters_are_uniform_and_uncorrelated():
    count = 100_000
    words = philox4x32((np.arange(count), 0, 0, 0), (1, 2))
    for word in words.astype(np.int64):
        assert chisquare(np.bincount(word >> 24, minlength=256)).pvalue > 1e-4
        assert chisquare(np.bincount(word & 255, minlength=256)).pvalue > 1e-4
    u = uniform(words)
    correlation = np.corrcoef(np.concatenate([u[:, 1:], u[:, :-1]]))
    assert np.abs(correlation[~np.eye(8, dtype=bool)]).max() < 4.5 / math.sqrt(count)


def test_uniforms_are_in_the_half_open_interval():
    u = uniform(np.array([0, 1, 1 << 31, ONES], dtype=np.uint64))
    assert u.tolist() == [0.0, 2.0**-32, 0.5, 1 - 2.0**-32]


def test_split_words():
    low, high = split_words([0, ONES, 1 << 32, 2**64 - 1])
    assert low.tolist() == [0, ONES, 0, ONES]
    assert high.tolist() == [0, 0, 1, ONES]


@pytest.mark.parametrize("key", [0, 1, 2**64 - 1])
def test_permute_is_a_bijection_for_every_small_size(key):
    for n in [*range(1, 700), 1023, 1024, 1025, 4095, 4096, 4097, 65536, 65537]:
        assert np.bincount(permute(np.arange(n), n, key), minlength=n).tolist() == [1] * n, n


@settings(max_examples=150, deadline=None)
@given(n=SIZES, key=KEYS, data=st.data())
def test_permute_stays_inside_and_never_collides(n, key, data):
    start = data.draw(st.integers(0, n - 1))
    x = np.unique(np.concatenate([np.arange(start, min(start + 500, n)), np.linspace(0, n - 1, 500).astype(np.int64)]))
    y = permute(x, n, key)
    assert y.dtype == np.int64
    assert y.min() >= 0
    assert y.max() < n
    assert len(np.unique(y)) == len(x)


@settings(max_examples=50, deadline=None)
@given(n=st.integers(1, 3000), key=KEYS)
def test_permute_is_a_bijection_for_any_key(n, key):
    assert np.array_equal(np.sort(permute(np.arange(n), n, key)), np.arange(n))


def test_permute_of_one_element_does_not_depend_on_its_company():
    rng = np.random.default_rng(0)
    n = rng.integers(1, 10**6, 300)
    x, key = (rng.random(300) * n).astype(np.int64), rng.integers(0, 2**63, 300)
    together = permute(x, n, key)
    alone = [int(permute(a, b, c)) for a, b, c in zip(x, n, key, strict=True)]
    assert together.tolist() == alone
    assert permute(x.reshape(3, 100), n.reshape(3, 100), key.reshape(3, 100)).shape == (3, 100)


@pytest.mark.parametrize("n", [2, 3, 4])
def test_all_shuffles_of_a_few_items_are_equally_likely(n):
    keys = np.random.default_rng(n).integers(0, 2**63, 50_000)
    places = permute(np.arange(n)[:, None], n, keys)
    code = np.zeros(len(keys), dtype=np.int64)
    for row in places:
        code = code * n + row
    counts = np.unique(code, return_counts=True)[1]
    assert len(counts) == math.factorial(n)
    assert chisquare(counts).pvalue > 1e-4


@pytest.mark.parametrize("n", [7, 9, 16, 17, 60])
@pytest.mark.parametrize("keys", ["random", "counted"])
def test_the_places_of_two_items_are_uniform_over_keys(n, keys):
    count = 60_000
    key = np.arange(count) if keys == "counted" else np.random.default_rng(1).integers(0, 2**63, count)
    first = permute(0, n, key)
    for other in (1, n // 2, n - 1):
        pairs = np.bincount(first * n + permute(other, n, key), minlength=n * n).reshape(n, n)
        assert np.trace(pairs) == 0
        assert chisquare(pairs[~np.eye(n, dtype=bool)]).pvalue > 1e-4


def test_no_order_is_kept():
    """Neighbours stay neighbours, and items stay in place, as often as in a uniform shuffle."""
    n, count = 500, 400
    places = permute(np.arange(n)[:, None], n, np.arange(count))
    fixed = (places == np.arange(n)[:, None]).sum(axis=0)
    successors = (np.diff(places, axis=0) == 1).sum(axis=0)
    for statistic in (fixed, successors):  # both have mean 1 and variance 1
        assert abs(statistic.mean() - 1) < 5 / math.sqrt(count)
        assert 0.5 < statistic.var() < 1.6
    rank_correlation = [np.corrcoef(np.arange(n), places[:, i])[0, 1] for i in range(count)]
    assert abs(np.mean(rank_correlation)) < 5 / math.sqrt(n * count)
    assert np.std(rank_correlation) == pytest.approx(1 / math.sqrt(n - 1), rel=0.2)


@pytest.mark.parametrize("n", [1, 2, 3, 5, 7, 101, 1025, 10**6 + 1])
def test_the_cycle_walk_is_short(n, monkeypatch):
    passed = []
    feistel = draw.feistel
    monkeypatch.setattr(draw, "feistel", lambda x, *rest: passed.append(len(x)) or feistel(x, *rest))
    permute(np.arange(5000) % n, n, np.arange(5000))
    assert sum(passed) < 1.4 * 5000


def test_permute_makes_nothing_of_size_n():
    permute(0, 10, 0)
    tracemalloc.start()
    permute(np.arange(100), 10**12, 3)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 200_000


@pytest.mark.parametrize(("x", "n"), [(3, 3), (0, 0), (0, MAX_PERMUTE + 1)])
def test_permute_refuses_what_is_outside(x, n):
    with pytest.raises(AssertionError, match="permute"):
        permute(x, n, 0)
