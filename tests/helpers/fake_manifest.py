"""A manifest in memory and plans over it, for the tests of the plan."""

from __future__ import annotations

from dataclasses import fields

import numpy as np

from fastav.data.clip import PlanBatch
from fastav.data.plan import Plan, Sampling

MEL_BANDS = 128


def mel_frames(duration_s):
    samples = np.rint(np.asarray(duration_s) * 16_000).astype(np.int64)
    return np.where(samples > 0, 1 + samples // 128, 0)


class FakeManifest:
    """Numeric columns and labels in memory, with what the plan needs of a manifest."""

    path = "fake.parquet"

    def __init__(self, num_clips, labels=None, **columns):
        rng = np.random.default_rng(num_clips)
        self._columns = {
            "num_frames": rng.integers(1, 300, num_clips),
            "width": rng.integers(40, 900, num_clips),
            "height": rng.integers(40, 900, num_clips),
            "num_samples": rng.integers(1000, 500_000, num_clips),
            "sample_rate": np.full(num_clips, 44_100),
            "num_mel_frames": np.zeros(num_clips, dtype=np.int64),
            "duration_s": rng.random(num_clips) * 10,
            "weight": np.ones(num_clips, dtype=np.float32),
        } | {name: np.broadcast_to(np.asarray(value), num_clips) for name, value in columns.items()}
        self._labels = labels
        self._num_clips = num_clips
        self.asked_for_labels = 0

    def __len__(self):
        return self._num_clips

    def columns(self, rows, names):
        assert rows.dtype == np.int64
        return {name: self._columns[name][rows] for name in names}

    def label_means(self, rows, values_K):
        labels = self.label_matrix(rows)
        count = labels.sum(axis=1)
        return np.where(count > 0, labels @ values_K / np.maximum(count, 1), 1.0)

    def label_matrix(self, rows):
        self.asked_for_labels += 1
        return self._labels[rows].astype(np.float32)

    def class_counts(self):
        return self._labels.sum(axis=0).astype(np.int64)


def make_plan(*sizes, weights=None, seed=0, **sampling):
    sources = [size if isinstance(size, FakeManifest) else FakeManifest(size) for size in sizes]
    weights = weights or [1.0] * len(sources)
    return Plan(
        list(zip(sources, weights, strict=True)),
        Sampling(**sampling),
        seed=seed,
        mel_bands=MEL_BANDS,
        mel_frames=mel_frames,
    )


def join(batches):
    return {f.name: np.concatenate([getattr(b, f.name) for b in batches]) for f in fields(PlanBatch)}


def assert_same(a, b, but=()):
    for name in a:
        if name not in but:
            np.testing.assert_array_equal(a[name], b[name], err_msg=name)
