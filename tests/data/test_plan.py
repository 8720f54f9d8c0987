"""The plan as a pure function: order, coverage, mixing of manifests, evaluation, mistakes, speed."""

from __future__ import annotations

import math
import pickle
from dataclasses import fields

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastav.core.errors import UserError
from fastav.data.plan import Plan, Sampling, largest_remainder
from tests.helpers.fake_manifest import MEL_BANDS, FakeManifest, assert_same, join, make_plan, mel_frames

# Order


@settings(max_examples=40, deadline=None)
@given(
    n=st.integers(1, 150),
    repeat=st.integers(1, 4),
    epoch=st.integers(0, 10**6),
    seed=st.integers(0, 2**64 - 1),
)
def test_each_epoch_has_each_clip_exactly_repeat_times(n, repeat, epoch, seed):
    plan = make_plan(n, repeat=repeat, seed=seed)
    assert plan.epoch_size == n * repeat
    batch = plan.train(epoch * plan.epoch_size, plan.epoch_size)
    assert np.bincount(batch.row_B, minlength=n).tolist() == [repeat] * n
    assert batch.replica_B.tolist() == list(range(repeat)) * n
    assert np.array_equal(batch.row_B, np.repeat(batch.row_B[::repeat], repeat))


@settings(max_examples=25, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 60), min_size=1, max_size=3),
    repeat=st.sampled_from([1, 2]),
    mixup=st.sampled_from([0.0, 0.4]),
    start=st.integers(0, 10**12),
    cuts=st.lists(st.integers(1, 40), min_size=1, max_size=6),
)
def test_any_slicing_gives_the_same_plans(sizes, repeat, mixup, start, cuts):
    plan = make_plan(*sizes, repeat=repeat, mixup=mixup, mix_block=64)
    unit = 2 * repeat
    start, counts = start * unit, [cut * unit for cut in cuts]
    starts = start + np.concatenate([[0], np.cumsum(counts)])
    whole = join([plan.train(start, sum(counts))])
    parts = join([plan.train(int(s), c) for s, c in zip(starts, counts, strict=False)])
    assert_same(whole, parts, but=("partner_B",))
    first = np.repeat(starts[:-1], counts)
    assert np.array_equal(whole["partner_B"] + start, parts["partner_B"] + first)  # the same partner, too


@pytest.mark.parametrize("sizes", [(37,), (37, 11, 5)])
@pytest.mark.parametrize("num_ranks", [1, 2, 3, 8])
def test_ranks_are_disjoint_and_join_to_the_single_process_order(sizes, num_ranks):
    plan, per_rank, steps = make_plan(*sizes, mix_block=30), 24 // num_ranks, 7
    single = join([plan.train(step * 24, 24) for step in range(steps)])
    ranks = [[plan.train(step * 24 + rank * per_rank, per_rank) for step in range(steps)] for rank in range(num_ranks)]
    joined = join([ranks[rank][step] for step in range(steps) for rank in range(num_ranks)])
    assert_same(single, joined, but=("partner_B",))
    seen = [set(join(batches)["sample_B"].tolist()) for batches in ranks]
    assert len(set.union(*seen)) == sum(map(len, seen)) == 24 * steps


def test_the_order_differs_between_epochs_and_seeds():
    plan, other = make_plan(200), make_plan(200, seed=1)
    orders = [plan.train(epoch * 200, 200).row_B for epoch in range(20)] + [other.train(0, 200).row_B]
    for i, a in enumerate(orders):
        assert abs(np.corrcoef(a, np.arange(200))[0, 1]) < 0.3
        for b in orders[:i]:
            assert (a == b).sum() < 10
            assert abs(np.corrcoef(a, b)[0, 1]) < 0.35


def test_a_plan_survives_pickling_and_is_small():
    manifest = FakeManifest(10)
    plan = make_plan(manifest, repeat=2, mixup=0.3)
    copy = pickle.loads(pickle.dumps(plan))
    assert_same(join([plan.train(40, 20)]), join([copy.train(40, 20)]))
    assert len(pickle.dumps(plan)) - len(pickle.dumps(manifest)) < 6000


def test_far_positions_are_as_complete():
    plan = make_plan(1000)
    far = 10**12
    batch = plan.train(far, 1000)
    assert np.array_equal(np.sort(batch.row_B), np.arange(1000))
    assert batch.sample_B[0] == far


def test_a_single_clip_is_every_sample():
    batch = make_plan(1).train(10**12, 64)
    assert not batch.row_B.any()
    assert len(np.unique(batch.crop_B4, axis=0)) > 50  # 64 epochs, each with draws of its own


# Several manifests


@settings(max_examples=30, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 50), min_size=2, max_size=4),
    data=st.data(),
    repeat=st.sampled_from([1, 2, 4]),
    block=st.integers(0, 10**9),
)
def test_each_block_has_the_exact_counts(sizes, data, repeat, block):
    weights = data.draw(st.lists(st.floats(0.2, 5), min_size=len(sizes), max_size=len(sizes)))
    plan = make_plan(*sizes, weights=weights, mix_block=256, repeat=repeat)
    counts = largest_remainder(weights, 256 // repeat) * repeat
    for i in range(3):
        batch = plan.train((block + i) * 256, 256)
        assert np.bincount(batch.source_B, minlength=len(sizes)).tolist() == counts.tolist()
        assert np.array_equal(batch.source_B[::repeat], batch.source_B[repeat - 1 :: repeat])


def test_each_source_walks_its_own_epochs():
    sizes, weights = (13, 40, 7), (1.0, 2.0, 0.5)
    plan = make_plan(*sizes, weights=weights, mix_block=35)
    assert plan.epoch_size == 60
    assert plan.num_evaluated == 60
    batch = plan.train(0, 35 * 60)
    for source, size in enumerate(sizes):
        rows = batch.row_B[batch.source_B == source]
        share = largest_remainder(weights, 35)[source]
        assert len(rows) == share * 60
        assert plan.sources[source].draws_per_block == share
        # Within a block the sources' draws are shuffled, so epochs are compared a whole block at a time.
        counts = np.bincount(rows, minlength=size)
        assert counts.max() - counts.min() <= 1
        epochs = math.lcm(int(share), size)
        assert np.bincount(rows[:epochs], minlength=size).tolist() == [epochs // size] * size


def test_the_sources_are_spread_within_a_block_and_differently_in_each():
    plan = make_plan(50, 50, weights=[3, 1], mix_block=400)
    blocks = np.stack([plan.train(400 * i, 400).source_B for i in range(50)])
    assert (blocks.sum(axis=1) == 100).all()
    mean = blocks.mean(axis=0)
    assert 0.02 < mean.min() < mean.max() < 0.55  # 50 draws at 1/4: no position belongs to one source
    assert len({row.tobytes() for row in blocks}) == 50


@pytest.mark.parametrize(
    ("weights", "total", "expected"),
    [
        ([1, 1, 1], 10, [4, 3, 3]),
        ([0.3, 0.7], 10, [3, 7]),
        ([0.1, 0.2, 0.7], 1000, [100, 200, 700]),
        ([5, 3, 1], 4, [2, 1, 1]),  # quotas 2.22, 1.33, 0.44
        ([1, 999], 10, [0, 10]),
    ],
)
def test_largest_remainder(weights, total, expected):
    assert largest_remainder(weights, total).tolist() == expected


# Evaluation


@settings(max_examples=30, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 40), min_size=1, max_size=3),
    batch_size=st.integers(1, 17),
    num_ranks=st.sampled_from([1, 2, 3, 8]),
)
def test_evaluation_covers_each_clip_once_and_pads_with_weight_0(sizes, batch_size, num_ranks):
    plan = make_plan(*sizes, repeat=2)
    steps = -(-plan.num_evaluated // (batch_size * num_ranks))
    starts = range(0, steps * num_ranks * batch_size, batch_size)
    got = join([plan.evaluate(start, batch_size) for start in starts])
    real = got["weight_B"] > 0
    expected = [(source, row) for source, size in enumerate(sizes) for row in range(size)]
    assert list(zip(got["source_B"][real].tolist(), got["row_B"][real].tolist(), strict=True)) == expected
    assert got["sample_B"][real].tolist() == list(range(len(expected)))
    assert (got["weight_B"][real] == 1).all()
    assert (got["sample_B"][~real] == -1).all()
    assert not got["row_B"][~real].any()
    assert not got["source_B"][~real].any()


def test_evaluation_is_not_random_and_takes_the_centre():
    manifest = FakeManifest(3, num_frames=80, width=640, height=360, num_samples=441_000, weight=7.0)
    a, b = make_plan(manifest).evaluate(0, 4), make_plan(manifest, seed=5, mixup=0.5).evaluate(0, 4)
    assert_same(join([a]), join([b]))
    assert a.frames_BT[0].tolist() == list(range(5, 80, 10))
    assert a.crop_B4[0].tolist() == [162, 22, 315, 315]
    assert not a.flip_B.any()
    assert not a.band_B2.any()
    assert a.weight_B.tolist() == [1, 1, 1, 0]
    assert a[3].frames_T.tolist() == a[0].frames_T.tolist()  # padding can be decoded


def test_dtypes_and_shapes_of_both_kinds_of_batch():
    plan = make_plan(20, frames=5, mixup=0.3)
    for batch, windows in ((plan.train(0, 8), 1), (plan.evaluate(16, 8), 5)):
        types = {f.name: (getattr(batch, f.name).dtype.name, getattr(batch, f.name).shape) for f in fields(batch)}
        assert types == {
            "sample_B": ("int64", (8,)),
            "source_B": ("int64", (8,)),
            "row_B": ("int64", (8,)),
            "replica_B": ("int64", (8,)),
            "frames_BT": ("int32", (8, 5)),
            "crop_B4": ("float32", (8, 4)),
            "flip_B": ("bool", (8,)),
            "windows_BW": ("int32", (8, windows)),
            "band_B2": ("int32", (8, 2)),
            "mix_B": ("float32", (8,)),
            "partner_B": ("int64", (8,)),
            "weight_B": ("float32", (8,)),
        }


# Mistakes


@pytest.mark.parametrize(
    ("sampling", "message"),
    [
        ({"crop_scale": (0.5, 0.1)}, r"sampling.crop_scale = \[0.5, 0.1\]: expected"),
        (
            {"crop_scale": (0.5, 1.5)},
            r"sampling.crop_scale = \[0.5, 1.5\]: expected lowest and highest value in 0 to 1",
        ),
        ({"crop_ratio": (2.0, 1.0)}, r"sampling.crop_ratio = \[2, 1\]: expected"),
        ({"crop_ratio": (0.5, math.inf)}, r"sampling.crop_ratio = \[0.5, inf\]: expected"),
        ({"eval_windows": ()}, r"sampling.eval_windows is empty"),
        ({"mask_bands": MEL_BANDS}, r"sampling.mask_bands = 128: expected fewer than the 128 mel bands"),
        ({"mixup": 1e9}, r"sampling.mixup = 1e\+09: expected"),
    ],
)
def test_contradicting_settings_are_refused(sampling, message):
    with pytest.raises(UserError, match=message):
        make_plan(10, **sampling)


def test_sources_that_cannot_be_mixed_are_refused():
    with pytest.raises(UserError, match="list of manifests is empty"):
        make_plan()
    with pytest.raises(UserError, match=r"fake.parquet: has no clips"):
        make_plan(FakeManifest(0))
    for weight in (0.0, -1.0, math.inf, math.nan):
        with pytest.raises(UserError, match=r"fake.parquet: weight = .*: expected a positive number"):
            make_plan(5, 5, weights=[1.0, weight])
    with pytest.raises(UserError, match=r"weight = 0.001: expected at least one clip in a block"):
        make_plan(5, 5, weights=[1.0, 0.001], mix_block=100)
    with pytest.raises(UserError, match=r"sampling.mix_block = 100: expected a multiple of sampling.repeat \(3\)"):
        make_plan(5, 5, mix_block=100, repeat=3)
    make_plan(5, mix_block=100, repeat=3)  # a single source has no blocks
    make_plan(5, mix_block=2, repeat=3)


@pytest.mark.parametrize(("start", "count"), [(-1, 4), (0, 0), (1 << 48, 1)])
def test_ranges_outside_the_stream_are_refused(start, count):
    plan = make_plan(10)
    for call in (plan.train, plan.evaluate):
        with pytest.raises(UserError, match=r"samples -?\d+ to -?\d+: expected a start"):
            call(start, count)


@pytest.mark.parametrize("seed", [-1, 1 << 64])
def test_seeds_outside_64_bits_are_refused(seed):
    with pytest.raises(UserError, match=f"seed = {seed}: expected"):
        make_plan(10, seed=seed)


def test_sampling_reads_plain_tables_and_checks_types():
    sampling = msgspec.convert({"frames": 4, "crop_scale": [0.5, 1.0], "eval_windows": [0]}, Sampling)
    assert sampling == Sampling(frames=4, crop_scale=(0.5, 1.0), eval_windows=(0,))
    for bad in ({"frames": 0}, {"flip": 1.5}, {"balance": "clss"}, {"repeat": 0}, {"eval_crop": 0.0}, {"frame": 8}):
        with pytest.raises(msgspec.ValidationError):
            msgspec.convert(bad, Sampling)


# Speed and the real manifest


def test_the_plan_reads_a_written_manifest(tmp_path):
    manifest_module = pytest.importorskip("fastav.data.manifest")
    from fastav.data.clip import Clip

    clips = [
        Clip(
            id=f"clip{i}",
            video=tmp_path / f"{i}.mp4",
            audio=tmp_path / f"{i}.mp4",
            num_frames=80,
            fps=25.0,
            width=640,
            height=360,
            num_samples=441_000,
            sample_rate=44_100,
            duration_s=10.0,
            labels=("owl",) if i < 9 else ("wren",),
            weight=1.0,
        )
        for i in range(12)
    ]
    manifest = manifest_module.write_manifest(tmp_path / "manifest.parquet", clips)
    plan = Plan(
        [(manifest, 1.0)],
        Sampling(balance="class"),
        seed=3,
        mel_bands=MEL_BANDS,
        mel_frames=mel_frames,
    )
    batch = plan.train(12, 12)
    assert sorted(batch.row_B.tolist()) == list(range(12))
    weight = {clip.id: batch.weight_B[i] for i, clip in enumerate(manifest.clips(batch.row_B))}
    assert weight["clip0"] == pytest.approx(12 / (2 * 9), rel=1e-6)
    assert weight["clip11"] == pytest.approx(12 / (2 * 3), rel=1e-6)
    assert plan.evaluate(0, 1).windows_BW.tolist() == [[0, 150, 300, 450, 600]]
    again = pickle.loads(pickle.dumps(plan))
    assert_same(join([again.train(12, 12)]), join([batch]))
