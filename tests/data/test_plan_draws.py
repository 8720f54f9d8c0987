"""What the plan draws of each clip: independence, distributions, limits, and torchvision's crop by the letter."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import beta, kstest
from torchvision.transforms import RandomResizedCrop

from fastav.core.errors import UserError
from fastav.data.plan import (
    centre_crops,
    fitting_windows,
    random_crops,
    random_windows,
    segment_centres,
    segment_frames,
)
from tests.helpers.fake_manifest import MEL_BANDS, FakeManifest, assert_same, join, make_plan

# Independence of the draws


def flat_draws(batch):
    """One number in each stream for every sample."""
    return {
        "frame_first": batch.frames_BT[:, 0],
        "frame_last": batch.frames_BT[:, -1],
        "crop_x": batch.crop_B4[:, 0],
        "crop_w": batch.crop_B4[:, 2],
        "crop_h": batch.crop_B4[:, 3],
        "flip": batch.flip_B,
        "window": batch.windows_BW[:, 0],
        "band": batch.band_B2[:, 0],
        "mix": batch.mix_B,
    }


def uniform_clips(num_clips):
    return FakeManifest(num_clips, num_frames=10_000, width=640, height=480, num_samples=10**7)


def test_draws_are_independent_of_each_other_of_the_clip_and_of_the_epoch():
    n = 4000
    plan = make_plan(uniform_clips(n), mixup=1.0)
    columns = {}
    for epoch in range(3):
        batch = plan.train(epoch * n, n)
        by_row = np.argsort(batch.row_B)
        columns |= {(name, epoch): values[by_row] for name, values in flat_draws(batch).items()}
    last = columns["mix", 2]
    columns |= {("row", 0): np.arange(n), ("mix of the next row", 2): np.roll(last, 1)}
    names = list(columns)
    correlation = np.corrcoef(np.stack([columns[name] for name in names]).astype(np.float64))
    limit = 5 / math.sqrt(n)
    for i, a in enumerate(names):
        for j in range(i):
            if {a[0], names[j][0]} <= {"crop_x", "crop_w", "crop_h"} and a[1] == names[j][1]:
                continue  # of one crop: tied by its area
            assert abs(correlation[i, j]) < limit, (a, names[j], correlation[i, j])


def test_sources_have_draws_of_their_own():
    n = 2000
    plan = make_plan(uniform_clips(n), uniform_clips(n), mix_block=2, mixup=1.0)
    batch = plan.train(0, 2 * n)
    a, b = ({k: v[batch.source_B == s] for k, v in flat_draws(batch).items()} for s in (0, 1))
    order = [np.argsort(batch.row_B[batch.source_B == s]) for s in (0, 1)]
    for name in a:
        assert abs(np.corrcoef(a[name][order[0]], b[name][order[1]])[0, 1]) < 5 / math.sqrt(n), name


def test_seeds_have_draws_of_their_own():
    n = 2000
    batches = [make_plan(uniform_clips(n), seed=seed, mixup=1.0).train(0, n) for seed in (0, 1, 1 << 32)]
    orders = [np.argsort(batch.row_B) for batch in batches]
    for i, j in ((0, 1), (0, 2), (1, 2)):
        for name, values in flat_draws(batches[i]).items():
            other = flat_draws(batches[j])[name]
            assert abs(np.corrcoef(values[orders[i]], other[orders[j]])[0, 1]) < 5 / math.sqrt(n), name


def test_replicas_share_what_is_decoded_and_differ_in_what_is_augmented():
    n, repeat = 1500, 2
    batch = make_plan(uniform_clips(n), repeat=repeat, mixup=1.0).train(0, n * repeat)
    first, second = ({k: v[i::repeat] for k, v in join([batch]).items()} for i in range(repeat))
    for name in ("source_B", "row_B", "frames_BT", "windows_BW"):
        np.testing.assert_array_equal(first[name], second[name])
    for name, column in (("crop_B4", 0), ("crop_B4", 2), ("band_B2", 0), ("flip_B", None), ("mix_B", None)):
        a, b = (part[name] if column is None else part[name][:, column] for part in (first, second))
        assert abs(np.corrcoef(a, b)[0, 1]) < 5 / math.sqrt(n), name


def test_switching_one_draw_on_shifts_no_other():
    n = 300
    plain = join([make_plan(n, mask_bands=0, flip=0.0).train(0, n)])
    full = join([make_plan(n, mask_bands=15, flip=0.5, mixup=0.2).train(0, n)])
    assert_same(plain, full, but=("flip_B", "band_B2", "mix_B", "partner_B"))
    more_frames = join([make_plan(n, frames=16, flip=0.5).train(0, n)])
    assert_same(full, more_frames, but=("frames_BT", "mix_B", "partner_B"))
    first = join([make_plan(n, repeat=1).train(0, n)])
    second = join([make_plan(n, repeat=3).train(0, 3 * n)])
    assert_same(
        {k: v for k, v in first.items() if k not in ("sample_B", "partner_B")}, {k: v[::3] for k, v in second.items()}
    )


# Frames


@settings(max_examples=200, deadline=None)
@given(n=st.integers(1, 10**6), num_segments=st.integers(1, 64), seed=st.integers(0, 1000))
def test_segment_frames_lie_in_their_segments(n, num_segments, seed):
    u = np.random.default_rng(seed).integers(0, 2**32, (50, num_segments)) * 2.0**-32
    u[0], u[1] = 0, 1 - 2.0**-32
    frames = segment_frames(np.full(50, n), u)
    index = np.arange(num_segments)
    assert frames.dtype == np.int32
    assert (np.diff(frames, axis=1) >= 0).all()
    assert (frames >= index * n // num_segments).all()
    assert (frames * num_segments < (index + 1) * n).all()
    centres = segment_centres(np.array([n]), num_segments)[0]
    assert centres.tolist() == [((2 * i + 1) * n) // (2 * num_segments) for i in index]


def test_segment_centres_by_hand():
    assert segment_centres(np.array([250, 8, 16, 3, 1, 0]), 8).tolist() == [
        [15, 46, 78, 109, 140, 171, 203, 234],
        list(range(8)),
        [1, 3, 5, 7, 9, 11, 13, 15],
        [0, 0, 0, 1, 1, 2, 2, 2],
        [0] * 8,
        [0] * 8,
    ]


def test_segment_frames_are_uniform_within_the_segment():
    plan = make_plan(FakeManifest(20_000, num_frames=80))
    frames = plan.train(0, 20_000).frames_BT - 10 * np.arange(8)
    for segment in frames.T:
        counts = np.bincount(segment, minlength=10)
        assert len(counts) == 10
        assert abs(counts - 2000).max() < 5 * math.sqrt(2000)


# Crops


def crops_by_the_letter(width, height, u, scale, ratio):
    """torchvision's get_params, line by line, with given uniforms."""
    log_ratio = math.log(ratio[0]), math.log(ratio[1])
    for i in range(10):
        target_area = width * height * (scale[0] + (scale[1] - scale[0]) * u[2 * i])
        aspect_ratio = math.exp(log_ratio[0] + (log_ratio[1] - log_ratio[0]) * u[2 * i + 1])
        w = round(math.sqrt(target_area * aspect_ratio))
        h = round(math.sqrt(target_area / aspect_ratio))
        if 0 < w <= width and 0 < h <= height:
            return [int(u[20] * (width - w + 1)), int(u[21] * (height - h + 1)), w, h]
    in_ratio = width / height
    w, h = width, height
    if in_ratio < min(ratio):
        h = round(w / min(ratio))
    elif in_ratio > max(ratio):
        w = round(h * max(ratio))
    return [(width - w) // 2, (height - h) // 2, w, h]


@settings(max_examples=60, deadline=None)
@given(
    sizes=st.lists(st.tuples(st.integers(1, 2000), st.integers(1, 2000)), min_size=1, max_size=20),
    scale=st.sampled_from([(0.08, 1.0), (0.9, 1.0), (1.0, 1.0)]),
    ratio=st.sampled_from([(3 / 4, 4 / 3), (1.0, 1.0), (0.2, 0.5)]),
    seed=st.integers(0, 10**6),
)
def test_random_crops_are_torchvisions(sizes, scale, ratio, seed):
    u = np.random.default_rng(seed).random((len(sizes), 24))
    width, height = np.array(sizes).T
    crops = random_crops(width, height, u, scale, ratio)
    for crop, w, h, u_U in zip(crops.tolist(), width.tolist(), height.tolist(), u, strict=True):
        expected = crops_by_the_letter(w, h, u_U, scale, ratio)
        expected[2:] = [max(1, side) for side in expected[2:]]
        if min(w, h) > 2:  # torchvision's fallback can be empty
            assert crop == expected
        assert crop[0] >= 0
        assert crop[1] >= 0
        assert 1 <= crop[2] <= w - crop[0]
        assert 1 <= crop[3] <= h - crop[1]


@pytest.mark.parametrize(("width", "height"), [(2000, 20), (20, 2000), (1999, 21), (1, 1)])
def test_the_fallback_is_torchvisions_own(width, height):
    import torch

    image = torch.zeros(3, height, width)
    top, left, h, w = RandomResizedCrop.get_params(image, [0.9, 1.0], [3 / 4, 4 / 3])
    u = np.random.default_rng(0).random((1, 24))
    crop = random_crops(np.array([width]), np.array([height]), u, (0.9, 1.0), (3 / 4, 4 / 3))
    assert crop[0].tolist() == [left, top, w, h]


def test_crop_sizes_are_distributed_as_torchvisions():
    import torch

    torch.manual_seed(0)
    image, count = torch.zeros(3, 360, 640), 3000
    theirs = np.array([RandomResizedCrop.get_params(image, [0.08, 1.0], [3 / 4, 4 / 3]) for _ in range(count)])
    ours = make_plan(FakeManifest(count, width=640, height=360)).train(0, count).crop_B4
    for a, b in (
        (ours[:, 0], theirs[:, 1]),
        (ours[:, 1], theirs[:, 0]),
        (ours[:, 2], theirs[:, 3]),
        (ours[:, 3], theirs[:, 2]),
    ):
        assert kstest(a, b).pvalue > 1e-3


def test_centre_crops():
    crops = centre_crops(np.array([640, 360, 64, 1, 0, 640]), np.array([360, 640, 64, 1, 10, 0]), 0.875)
    assert crops.tolist() == [[162, 22, 315, 315], [22, 162, 315, 315], [4, 4, 56, 56], [0, 0, 1, 1], [0] * 4, [0] * 4]
    assert centre_crops(np.array([640]), np.array([360]), 1.0).tolist() == [[140, 0, 360, 360]]


def test_the_centre_crop_is_resize_256_and_crop_224():
    """Against torchvision's transforms on a smooth picture, where half a pixel of the source hardly shows."""
    import torch
    from torchvision.transforms import functional

    y, x = torch.meshgrid(torch.linspace(0, 1, 360), torch.linspace(0, 1, 640), indexing="ij")
    image = torch.stack([x, y, (x + y) / 2])
    theirs = functional.center_crop(functional.resize(image, 256, antialias=True), 224)
    left, top, w, h = (int(v) for v in centre_crops(np.array([640]), np.array([360]), 0.875)[0])
    ours = functional.resize(image[:, top : top + h, left : left + w], [224, 224], antialias=True)
    assert (ours - theirs).abs().max() < 1.5 / 360


def test_flip_has_its_probability():
    for flip, low, high in ((0.0, 0, 0), (0.25, 0.22, 0.28), (1.0, 1, 1)):
        assert low <= make_plan(FakeManifest(4000), flip=flip).train(0, 4000).flip_B.mean() <= high


# Sound


def test_random_windows_are_uniform_over_all_starts():
    u = np.random.default_rng(0).random(20_000)
    starts = random_windows(np.full(20_000, 409), 400, u)
    assert starts.shape == (20_000, 1)
    assert abs(np.bincount(starts[:, 0], minlength=10) - 2000).max() < 5 * math.sqrt(2000)
    edge = random_windows(np.array([400, 399, 1, 0, 401]), 400, np.full(5, 1 - 2.0**-32))
    assert edge[:, 0].tolist() == [0, 0, 0, 0, 1]


def test_fitting_windows():
    lengths = np.array([1251, 1000, 999, 550, 549, 400, 399, 0])
    starts = fitting_windows(lengths, 400, (0, 150, 300, 450, 600))
    assert starts.tolist() == [
        [0, 150, 300, 450, 600],
        [0, 150, 300, 450, 600],
        [0, 150, 300, 450, -1],
        [0, 150, -1, -1, -1],
        [0, -1, -1, -1, -1],
        [0, -1, -1, -1, -1],
        [0, -1, -1, -1, -1],
        [0, -1, -1, -1, -1],
    ]
    assert fitting_windows(np.array([500]), 400, (150, 300)).tolist() == [[0, -1]]


def test_window_lengths_come_from_the_sound_or_the_stored_spectrogram():
    manifest = FakeManifest(
        4,
        num_samples=[441_000, 0, 0, 44_100],
        num_mel_frames=[0, 560, 0, 0],
        duration_s=[99.0, 99.0, 99.0, 99.0],  # the picture's length is not the sound's
    )
    plan = make_plan(manifest)
    assert plan.evaluate(0, 4).windows_BW.tolist() == [
        [0, 150, 300, 450, 600],  # 10 s: 1251 mel frames
        [0, 150, -1, -1, -1],
        [0, -1, -1, -1, -1],
        [0, -1, -1, -1, -1],
    ]
    batch = plan.train(0, 4000)
    highest = [batch.windows_BW[batch.row_B == row].max() for row in range(4)]
    assert 830 <= highest[0] <= 851
    assert 158 <= highest[1] <= 160
    assert highest[2:] == [0, 0]


def test_masked_bands_stay_inside_and_reach_both_ends():
    batch = make_plan(FakeManifest(3000)).train(0, 3000)
    assert set(batch.band_B2[:, 1].tolist()) == {15}
    first = batch.band_B2[:, 0]
    assert (first.min(), first.max()) == (0, MEL_BANDS - 15)
    assert first.mean() == pytest.approx((MEL_BANDS - 15) / 2, abs=5 * 33 / math.sqrt(3000))
    assert not make_plan(10, mask_bands=0).train(0, 10).band_B2.any()


def test_a_missing_modality_has_zeros():
    manifest = FakeManifest(2, num_frames=[0, 9], num_samples=[44_100, 0], width=[640, 640])
    batch = make_plan(manifest).train(0, 200)
    deaf, blind = batch.row_B == 1, batch.row_B == 0
    assert not batch.crop_B4[blind].any()
    assert not batch.flip_B[blind].any()
    assert not batch.frames_BT[blind].any()
    assert batch.crop_B4[deaf, 2].min() > 0
    assert not batch.windows_BW[deaf].any()
    assert not batch.band_B2[deaf].any()
    assert batch.band_B2[blind, 1].min() == 15
    assert make_plan(manifest).evaluate(0, 2).crop_B4[0].tolist() == [0, 0, 0, 0]


# Mixup


@pytest.mark.parametrize("alpha", [0.2, 1.0, 4.0])
def test_mixup_weights_are_beta_distributed(alpha):
    batch = make_plan(5000, mixup=alpha).train(0, 5000)
    assert kstest(batch.mix_B, beta(alpha, alpha).cdf).pvalue > 1e-3
    assert ((batch.mix_B >= 0) & (batch.mix_B <= 1)).all()


@pytest.mark.parametrize("repeat", [1, 2, 3])
def test_mixup_partners_are_other_clips_and_mutual(repeat):
    plan = make_plan(100, mixup=0.2, repeat=repeat)
    batch = plan.train(4 * repeat, 24 * repeat)
    partner = batch.partner_B
    assert np.array_equal(partner[partner], np.arange(len(batch)))
    assert (batch.row_B[partner] != batch.row_B).all()
    assert np.array_equal(batch.replica_B[partner], batch.replica_B)
    assert abs(partner - np.arange(len(batch))).max() == repeat


def test_without_mixup_each_row_is_its_own_partner():
    for batch in (make_plan(9).train(3, 7), make_plan(9, mixup=0.5).evaluate(0, 7)):
        assert batch.partner_B.tolist() == list(range(7))
        assert (batch.mix_B == 1).all()


@pytest.mark.parametrize(("start", "count"), [(2, 8), (4, 6), (1, 4)])
def test_training_calls_that_tear_partners_apart_are_refused(start, count):
    plan = make_plan(10, mixup=0.2, repeat=2)
    with pytest.raises(UserError, match=rf"{start} \+ {count}: .*multiples of 2 \* sampling.repeat = 4"):
        plan.train(start, count)
    make_plan(10, repeat=2).train(start, count)


# Weights


def one_hot(labels, num_classes):
    return np.eye(num_classes)[labels]


def test_class_balance_gives_each_present_class_the_same_total():
    labels = np.repeat([0, 1, 3], [60, 30, 10])
    plan = make_plan(FakeManifest(100, one_hot(labels, 4)), balance="class")
    batch = plan.train(0, 100)
    weight = np.empty(100)
    weight[batch.row_B] = batch.weight_B
    assert weight.mean() == pytest.approx(1, abs=1e-6)
    totals = [weight[labels == k].sum() for k in (0, 1, 3)]
    assert totals == pytest.approx([100 / 3] * 3, rel=1e-6)
    assert weight[0] == pytest.approx(100 / (3 * 60), rel=1e-6)


def test_class_balance_averages_over_labels_and_times_the_clips_own_weight():
    matrix = np.array([[1, 1, 0], [1, 0, 1], [1, 1, 0], [0, 0, 0]])
    plan = make_plan(FakeManifest(4, matrix, weight=[1.0, 1.0, 2.0, 0.5]), balance="class")
    batch = plan.train(0, 4)
    weight = np.empty(4)
    weight[batch.row_B] = batch.weight_B
    a, b, c = 6 / (3 * 3), 6 / (3 * 2), 6 / (3 * 1)
    assert weight == pytest.approx([(a + b) / 2, (a + c) / 2, a + b, 0.5], rel=1e-6)


def test_without_balance_the_weight_is_the_clips_own_and_labels_are_not_read():
    manifest = FakeManifest(5, one_hot(np.zeros(5, int), 1), weight=[0, 0.5, 1, 2, 3])
    batch = make_plan(manifest).train(0, 5)
    assert batch.weight_B.dtype == np.float32
    assert np.array_equal(batch.weight_B, np.array([0, 0.5, 1, 2, 3])[batch.row_B])
    assert not manifest.asked_for_labels


def test_class_balance_is_by_source():
    a = FakeManifest(10, one_hot(np.repeat([0, 1], [8, 2]), 2))
    b = FakeManifest(10, one_hot(np.repeat([0, 1], [5, 5]), 2))
    batch = make_plan(a, b, balance="class", mix_block=20).train(0, 20)
    assert batch.weight_B[batch.source_B == 1].tolist() == [1] * 10
    assert sorted(set(batch.weight_B[batch.source_B == 0].tolist())) == pytest.approx([10 / 16, 10 / 4])
