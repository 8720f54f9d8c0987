"""The plan: which clip is at which position of training or evaluation, what is read from it and how it is augmented.

All randomness of the input is here, as a pure function of (manifests, sampling, seed, position). The plan has no
state: the order is the same for any number of ranks and workers, and resuming needs one integer. Every draw is
a Philox word. Its key is (seed, purpose, source), its counter is (row, epoch of that source, replica, block). Each
purpose has its own stream, so turning one augmentation on never changes the draws of another. The shuffle is a keyed
bijection (`fastav.data.rng.permute`): the cost per position does not depend on the position or on the number of clips.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import TYPE_CHECKING, Annotated, Any, Literal

import numpy as np
from msgspec import Meta
from numpy.typing import ArrayLike, NDArray

from fastav.core.config import Config, Fraction, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt
from fastav.core.errors import UserError
from fastav.data.clip import PlanBatch
from fastav.data.rng import permute, philox4x32, split_words, uniform
from fastav.data.shuffle import blocked

if TYPE_CHECKING:
    from fastav.data.manifest import Manifest

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]

_CROP_TRIES = 10  # torchvision's RandomResizedCrop.get_params
_MAX_ALPHA = 1000  # above this, every mixup weight is 0.5
_MAX_NUMBER = 1 << 48  # samples, epochs and rows each have 48 bits in the counter
_COLUMNS = (
    "num_frames",
    "width",
    "height",
    "num_samples",
    "sample_rate",
    "num_mel_frames",
    "duration_s",
    "weight",
)


class Sampling(Config, frozen=True):
    """Which frames, crops and audio windows are taken from each clip, and how they are augmented.

    The defaults are those of SSW60 (section 4.1), with torchvision's random resized crop.

    Attributes:
        frames: Frames per clip (T). The clip is divided into T equal segments and gives one frame of each: a random one
            in training, the centre one in evaluation.
        image_size: Side in pixels of the square that crops are resized to.
        crop_scale: Smallest and largest area of a random training crop, as a fraction of the picture, at most 1.
        crop_ratio: Smallest and largest aspect ratio (width / height) of a random training crop.
        flip: Probability of a horizontal flip in training, 0 to 1.
        eval_crop: Side of the centred square crop in evaluation, as a fraction of the picture's shorter edge. 0.875 is
            the crop of 224 pixels from a picture resized to 256.
        window: Length of an audio window in mel frames.
        eval_windows: Starts of the evaluation windows, in mel frames from the start of the clip. Starts whose window
            does not fit into the clip are skipped.
        mask_bands: Number of consecutive mel bands masked in training; 0 turns masking off.
        mixup: Alpha of mixup's Beta(alpha, alpha) distribution, 0 to 1000; 0 turns mixup off.
        repeat: Number of augmented samples (crop, flip, mask, mixup) made from each decode of a clip.
        balance: `class` weights each clip in the loss by the inverse frequency of its classes; `none` does not.
        mix_block: With several manifests, number of samples within which their shares are exact; a multiple of
            `repeat`.
        order: `global` shuffles all clips of an epoch. `blocked` keeps neighbouring clips of the manifest close
            together, for shards on remote storage; see `block` and `block_window`.
        block: With `order = "blocked"`, number of neighbouring clips that stay together.
        block_window: With `order = "blocked"`, number of blocks whose clips are shuffled together.
    """

    frames: PositiveInt = 8
    image_size: PositiveInt = 224
    crop_scale: tuple[PositiveFloat, PositiveFloat] = (0.08, 1.0)
    crop_ratio: tuple[PositiveFloat, PositiveFloat] = (3 / 4, 4 / 3)
    flip: Fraction = 0.5
    eval_crop: Annotated[float, Meta(gt=0, le=1)] = 0.875
    window: PositiveInt = 400
    eval_windows: tuple[NonNegativeInt, ...] = (0, 150, 300, 450, 600)
    mask_bands: NonNegativeInt = 15
    mixup: NonNegativeFloat = 0.0
    repeat: Annotated[int, Meta(ge=1, le=1 << 15)] = 1
    balance: Literal["none", "class"] = "none"
    mix_block: PositiveInt = 1024
    order: Literal["global", "blocked"] = "global"
    block: PositiveInt = 64
    block_window: PositiveInt = 16

    def check(self, mel_bands: int, num_sources: int = 1) -> None:
        """Checks the settings against one another, the number of mel bands and the number of manifests.

        Raises:
            UserError: A value is invalid; the message names the key, its value and what is expected.
        """
        for name, (low, high), top in (
            ("crop_scale", self.crop_scale, 1),
            ("crop_ratio", self.crop_ratio, 100),
        ):
            if not 0 < low <= high <= top:
                raise UserError(
                    f"sampling.{name} = [{low:g}, {high:g}]: expected lowest and highest value in 0 to {top}"
                )
        if self.mixup > _MAX_ALPHA:
            raise UserError(f"sampling.mixup = {self.mixup:g}: expected 0 to {_MAX_ALPHA}")
        if not self.eval_windows:
            raise UserError("sampling.eval_windows is empty: expected at least one start in mel frames, such as [0]")
        if self.mask_bands >= mel_bands:
            raise UserError(f"sampling.mask_bands = {self.mask_bands}: expected fewer than the {mel_bands} mel bands")
        if num_sources > 1 and self.mix_block % self.repeat:
            raise UserError(
                f"sampling.mix_block = {self.mix_block}: expected a multiple of sampling.repeat ({self.repeat})"
            )


class Purpose(IntEnum):
    """The independent streams of random draws; a seed depends on these numbers, so never change or reuse one."""

    ORDER = 1
    BLOCK = 2
    FRAMES = 3
    CROP = 4
    FLIP = 5
    WINDOW = 6
    BAND = 7
    MIX = 8


_SHARED_BY_REPLICAS = (Purpose.FRAMES, Purpose.WINDOW)  # what one decode provides


@dataclass(frozen=True)
class PlanSource:
    """One of the mixed manifests.

    Attributes:
        manifest: The clips.
        weight: Share of the samples, relative to the weights of the other sources.
        num_clips: Number of rows in the manifest.
        draws_per_block: Number of clips drawn from it in each block of `mix_block // repeat` draws.
        class_weight_K: Loss weight of each class, in the manifest's order; None without balancing.
    """

    manifest: Manifest
    weight: float
    num_clips: int
    draws_per_block: int
    class_weight_K: Floats | None


class Plan:
    """The infinite stream of training samples and the list of evaluation samples, addressed by position.

    Training with one source of n clips: sample s is replica s % repeat of draw d = s // repeat, which is in
    epoch d // n, and its clip is `permute(d % n, n, key(epoch))`, or `blocked` of the same arguments. With several
    sources, each block of `mix_block` samples holds the same exact number from each source (largest remainder of the
    weights), in an order given by a keyed shuffle of the block. Each source has its own epochs: draw k of a source in
    block b is draw `b * draws_per_block + k` of that source's stream. So the clips of a source are drawn equally often,
    up to a difference of one.

    Args:
        sources: Manifests and their relative weights.
        sampling: What is taken from each clip and how it is augmented.
        seed: 0 to 2^64 - 1; all draws depend on it.
        mel_bands: Number M of mel bands of the spectrogram.
        mel_frames: Function from durations in seconds (float64 array) to numbers of mel frames (int64 array).

    Attributes:
        sources: The `PlanSource`s in the order of the argument; `source_B` are indices into them.
        sampling: The argument.
        seed: The argument.

    Raises:
        UserError: The settings contradict one another, a manifest has no clips, or a weight is not positive or too
            small to get one draw per block.
    """

    def __init__(
        self,
        sources: Sequence[tuple[Manifest, float]],
        sampling: Sampling,
        *,
        seed: int,
        mel_bands: int,
        mel_frames: Callable[[Floats], Ints],
    ) -> None:
        sampling.check(mel_bands, len(sources))
        if not 0 <= seed < 1 << 64:
            raise UserError(f"seed = {seed}: expected 0 to 2^64 - 1")
        self.sampling, self.seed = sampling, seed
        self.sources = _weigh(sources, sampling)
        self._mel_bands, self._mel_frames = mel_bands, mel_frames
        self._sizes_S = np.array([source.num_clips for source in self.sources], dtype=np.int64)
        self._per_block_S = np.array([source.draws_per_block for source in self.sources], dtype=np.int64)
        # One key of 64 pseudo-random bits for each purpose and source.
        purposes, numbers = np.arange(max(Purpose) + 1)[:, None], np.arange(len(self.sources))
        self._keys_2PS = philox4x32((purposes, numbers, 0, 0), split_words(seed))[:2]
        uniforms = {
            Purpose.FRAMES: sampling.frames,
            Purpose.CROP: 2 * _CROP_TRIES + 2,
            Purpose.FLIP: 1,
            Purpose.WINDOW: 1,
            Purpose.BAND: int(sampling.mask_bands > 0),
            Purpose.MIX: int(sampling.mixup > 0),
        }
        # The Philox blocks (four words each) of a sample, grouped by purpose and numbered from 0 within each.
        blocks = [(purpose, i) for purpose, count in uniforms.items() for i in range(-(-count // 4))]
        self._purpose_J = np.array([purpose for purpose, _ in blocks])
        self._block_J1 = np.array([i for _, i in blocks])[:, None]
        self._own_J1 = ~np.isin(self._purpose_J, _SHARED_BY_REPLICAS)[:, None]

    @property
    def epoch_size(self) -> int:
        """Samples per epoch: the number of clips of all sources times `repeat`."""
        return int(self._sizes_S.sum()) * self.sampling.repeat

    @property
    def num_evaluated(self) -> int:
        """Number of clips of all sources; evaluation visits each clip once."""
        return int(self._sizes_S.sum())

    def train(self, start: int, count: int) -> PlanBatch:
        """Returns samples `start` to `start + count - 1` of the training stream.

        Splitting a range into several calls gives the same plans, except for `partner_B`, which counts within the
        call: row p is mixed with row ((p // repeat) XOR 1) * repeat + p % repeat, the same replica of the neighbouring
        draw ("mixup", Zhang et al. 2018, equation 1, with a weight drawn from Beta(alpha, alpha) for each row).

        Args:
            start: First sample, 0 or more, counted from the start of training.
            count: Number of samples, 1 or more.

        Raises:
            UserError: The range is outside the stream, or separates mixup partners: with mixup, both numbers must be
                multiples of 2 * repeat.
        """
        sampling = self.sampling
        _check_range(start, count)
        if sampling.mixup and (start % (2 * sampling.repeat) or count % (2 * sampling.repeat)):
            raise UserError(
                f"training samples {start} + {count}: with mixup, expected multiples of 2 * sampling.repeat = "
                f"{2 * sampling.repeat}"
            )
        sample_B = np.arange(start, start + count, dtype=np.int64)
        draw_B, replica_B = np.divmod(sample_B, sampling.repeat)
        source_B, epoch_B, row_B = self._order(draw_B)
        column = self._columns(source_B, row_B)
        u = self._uniforms(source_B, row_B, epoch_B, replica_B)
        has_video_B = column["num_frames"] > 0
        has_audio_B = (column["num_samples"] > 0) | (column["num_mel_frames"] > 0)
        partner_B, mix_B = self._mixup(u, count)
        return PlanBatch(
            sample_B=sample_B,
            source_B=source_B,
            row_B=row_B,
            replica_B=replica_B,
            frames_BT=segment_frames(column["num_frames"], u[Purpose.FRAMES][:, : sampling.frames]),
            crop_B4=random_crops(
                column["width"] * has_video_B,
                column["height"] * has_video_B,
                u[Purpose.CROP],
                sampling.crop_scale,
                sampling.crop_ratio,
            ),
            flip_B=(u[Purpose.FLIP][:, 0] < sampling.flip) & has_video_B,
            windows_BW=random_windows(self._mel_length(column), sampling.window, u[Purpose.WINDOW][:, 0]),
            band_B2=self._bands(u, has_audio_B),
            mix_B=mix_B,
            partner_B=partner_B,
            weight_B=(column["weight"] * self._balance(source_B, row_B)).astype(np.float32),
        )

    def evaluate(self, start: int, count: int) -> PlanBatch:
        """Returns evaluation samples `start` to `start + count - 1`: each clip once, in manifest order.

        Nothing is random: frames are the centres of the T segments, the crop is the centred square, the windows are
        those of `eval_windows` that fit. Every clip has weight 1, whatever its weight in training. Rows past the end
        are padding: sample -1, weight 0, and otherwise the plan of row 0 of the first source.

        Raises:
            UserError: The start is negative or the count is below 1.
        """
        _check_range(start, count)
        sampling = self.sampling
        sample_B = np.arange(start, start + count, dtype=np.int64)
        real_B = sample_B < self.num_evaluated
        ends_S = np.cumsum(self._sizes_S)
        place_B = np.where(real_B, sample_B, 0)
        source_B = np.searchsorted(ends_S, place_B, side="right").astype(np.int64)
        row_B = place_B - (ends_S - self._sizes_S)[source_B]
        column = self._columns(source_B, row_B)
        has_video_B = column["num_frames"] > 0
        return PlanBatch(
            sample_B=np.where(real_B, sample_B, -1),
            source_B=source_B,
            row_B=row_B,
            replica_B=np.zeros(count, dtype=np.int64),
            frames_BT=segment_centres(column["num_frames"], sampling.frames),
            crop_B4=centre_crops(column["width"] * has_video_B, column["height"] * has_video_B, sampling.eval_crop),
            flip_B=np.zeros(count, dtype=np.bool_),
            windows_BW=fitting_windows(self._mel_length(column), sampling.window, sampling.eval_windows),
            band_B2=np.zeros((count, 2), dtype=np.int32),
            mix_B=np.ones(count, dtype=np.float32),
            partner_B=np.arange(count),
            weight_B=real_B.astype(np.float32),
        )

    def _order(self, draw_B: Ints) -> tuple[Ints, Ints, Ints]:
        """Returns the source, the epoch of that source and the row of each draw."""
        if len(self.sources) == 1:
            source_B, nth_B = np.zeros_like(draw_B), draw_B
        else:
            ends_S = np.cumsum(self._per_block_S)
            block_B, offset_B = np.divmod(draw_B, ends_S[-1])
            key_B = self._shuffle_key(Purpose.BLOCK, np.zeros_like(block_B), block_B)
            place_B = permute(offset_B, ends_S[-1], key_B)
            source_B = np.searchsorted(ends_S, place_B, side="right").astype(np.int64)
            nth_B = block_B * self._per_block_S[source_B] + place_B - (ends_S - self._per_block_S)[source_B]
        size_B = self._sizes_S[source_B]
        epoch_B, position_B = np.divmod(nth_B, size_B)
        key_B = self._shuffle_key(Purpose.ORDER, source_B, epoch_B)
        if self.sampling.order == "blocked":
            block, window = self.sampling.block, self.sampling.block_window
            return source_B, epoch_B, blocked(position_B, size_B, key_B, block=block, window=window)
        return source_B, epoch_B, permute(position_B, size_B, key_B)

    def _shuffle_key(self, purpose: Purpose, source_B: Ints, number_B: Ints) -> NDArray[np.uint64]:
        """Returns 64-bit keys of shuffle `number_B` (an epoch or a block) of each source."""
        key = (self._keys_2PS[0, purpose, source_B], self._keys_2PS[1, purpose, source_B])
        words = philox4x32((*split_words(number_B), 0, 0), key)
        return words[0] | (words[1] << np.uint64(32))

    def _uniforms(self, source_B: Ints, row_B: Ints, epoch_B: Ints, replica_B: Ints) -> dict[Purpose, Floats]:
        """Returns the uniforms of each active purpose, [B, 4 * blocks], all from one Philox call."""
        row_low, row_high = split_words(row_B)
        epoch_low, epoch_high = split_words(epoch_B)
        # Rows and epochs have 48 bits: their upper 16 bits share a word, replica and block share the last word.
        high = (row_high << np.uint64(16)) | epoch_high
        last_JB = ((replica_B * self._own_J1) << 16) | self._block_J1
        key_2JB = self._keys_2PS[:, self._purpose_J[:, None], source_B]
        words_4JB = philox4x32((row_low, epoch_low, high, last_JB), (key_2JB[0], key_2JB[1]))
        uniform_BJ4 = uniform(words_4JB).transpose(2, 1, 0)
        bounds = np.flatnonzero(np.diff(self._purpose_J)) + 1
        parts = np.split(uniform_BJ4, bounds, axis=1)
        purposes = self._purpose_J[[0, *bounds]]
        return {Purpose(i): part.reshape(len(row_B), -1) for i, part in zip(purposes, parts, strict=True)}

    def _columns(self, source_B: Ints, row_B: Ints) -> dict[str, NDArray[Any]]:
        """Returns the probed columns of the rows: float64 `duration_s` and `weight`, int64 the others."""
        parts: list[tuple[NDArray[Any], Mapping[str, NDArray[Any]]]] = []
        for i, source in enumerate(self.sources):
            where = np.flatnonzero(source_B == i)
            if where.size:
                parts.append((where, source.manifest.columns(row_B[where], _COLUMNS)))
        out: dict[str, NDArray[Any]] = {}
        for name in _COLUMNS:
            out[name] = np.empty(len(row_B), dtype=np.float64 if name in ("duration_s", "weight") else np.int64)
            for where, columns in parts:
                out[name][where] = columns[name]
        return out

    def _mel_length(self, column: Mapping[str, NDArray[Any]]) -> Ints:
        """Returns the number of mel frames of each clip: stored, or computed from the audio length; 0 without audio."""
        rate = column["sample_rate"]
        duration_s = np.where(rate > 0, column["num_samples"] / np.maximum(rate, 1), column["duration_s"])
        computed = np.where(column["num_samples"] > 0, self._mel_frames(duration_s), 0)
        return np.where(column["num_mel_frames"] > 0, column["num_mel_frames"], computed)

    def _bands(self, u: Mapping[Purpose, Floats], has_audio_B: NDArray[np.bool_]) -> NDArray[np.int32]:
        """Returns the first and the number of masked mel bands (SpecAugment, Park et al. 2019, with a fixed width)."""
        width = self.sampling.mask_bands
        if not width:
            return np.zeros((len(has_audio_B), 2), dtype=np.int32)
        first_B = np.floor(u[Purpose.BAND][:, 0] * (self._mel_bands - width + 1))
        bands_B2 = np.stack([first_B, np.full_like(first_B, width)], axis=1) * has_audio_B[:, None]
        return bands_B2.astype(np.int32)

    def _mixup(self, u: Mapping[Purpose, Floats], count: int) -> tuple[Ints, NDArray[np.float32]]:
        """Returns each row's mixup partner and its own weight; without mixup these are the row itself and 1."""
        place_B, repeat = np.arange(count, dtype=np.int64), self.sampling.repeat
        if not self.sampling.mixup:
            return place_B, np.ones(count, dtype=np.float32)
        return ((place_B // repeat) ^ 1) * repeat + place_B % repeat, _beta(self.sampling.mixup, u[Purpose.MIX][:, 0])

    def _balance(self, source_B: Ints, row_B: Ints) -> Floats:
        """Returns each clip's class weight, averaged over its labels; 1 without balancing or labels."""
        weight_B = np.ones(len(row_B))
        for i, source in enumerate(self.sources):
            where = np.flatnonzero(source_B == i)
            if source.class_weight_K is None or not where.size:
                continue
            weight_B[where] = source.manifest.label_means(row_B[where], source.class_weight_K)
        return weight_B


def largest_remainder(weights: ArrayLike, total: int) -> Ints:
    """Returns integers that sum to `total` and are in proportion to `weights` (Hamilton's method).

    Each gets the floor of its quota `total * w / sum(w)`. The remaining units go to the largest fractional parts, to
    the first ones where they are equal.
    """
    share = np.asarray(weights, dtype=np.float64)
    quota = total * share / share.sum()
    counts = np.floor(quota).astype(np.int64)
    order = np.argsort(-(quota - counts), kind="stable")
    counts[order[: total - int(counts.sum())]] += 1
    return counts


def segment_frames(num_frames_B: Ints, u_BT: Floats) -> NDArray[np.int32]:
    """Returns one random frame of each of T equal segments: floor((i + u_i) n / T); 0 for clips without frames.

    This is TSN's training sampling (Wang et al. 2016, section 3.1) in its continuous form, which also works for n < T
    (frames then repeat) and for pictures (n = 1).

    Args:
        num_frames_B: Number of frames n of each clip.
        u_BT: Uniforms in [0, 1), one for each segment.
    """
    num_segments = u_BT.shape[1]
    n_B1 = num_frames_B[:, None]
    frames_BT = np.floor((np.arange(num_segments) + u_BT) * n_B1 / num_segments)
    return np.clip(frames_BT, 0, np.maximum(n_B1 - 1, 0)).astype(np.int32)


def segment_centres(num_frames_B: Ints, num_segments: int) -> NDArray[np.int32]:
    """Returns the centre frame of each of T equal segments: floor((i + 0.5) n / T) (SSW60, section 4.1)."""
    return ((2 * np.arange(num_segments) + 1) * num_frames_B[:, None] // (2 * num_segments)).astype(np.int32)


def random_crops(
    width_B: Ints, height_B: Ints, u_BU: Floats, scale: tuple[float, float], ratio: tuple[float, float]
) -> NDArray[np.float32]:
    """Returns random crops x, y, width, height in whole pixels; zeros for clips without a picture.

    Same distribution as torchvision's `RandomResizedCrop.get_params` (after Szegedy et al. 2015). Up to ten tries draw
    an area uniform within `scale` and an aspect ratio log-uniform within `ratio`. The first crop that fits gets a
    uniform position. If none fits, the crop is the largest centred one whose aspect ratio is within the limits.

    Args:
        width_B: Upright widths, pixels.
        height_B: Upright heights, pixels.
        u_BU: Uniforms in [0, 1): area and ratio of each try, then x and y; at least 22.
        scale: Smallest and largest fraction of the area.
        ratio: Smallest and largest width / height.
    """
    W_B1, H_B1 = width_B[:, None].astype(np.float64), height_B[:, None].astype(np.float64)
    area_BN = W_B1 * H_B1 * (scale[0] + (scale[1] - scale[0]) * u_BU[:, 0 : 2 * _CROP_TRIES : 2])
    low, high = math.log(ratio[0]), math.log(ratio[1])
    ratio_BN = np.exp(low + (high - low) * u_BU[:, 1 : 2 * _CROP_TRIES : 2])
    w_BN, h_BN = np.rint(np.sqrt(area_BN * ratio_BN)), np.rint(np.sqrt(area_BN / ratio_BN))
    fits_BN = (w_BN > 0) & (w_BN <= W_B1) & (h_BN > 0) & (h_BN <= H_B1)
    first_B1 = fits_BN.argmax(axis=1)[:, None]
    w, h = (np.take_along_axis(size_BN, first_B1, axis=1)[:, 0] for size_BN in (w_BN, h_BN))
    W, H = W_B1[:, 0], H_B1[:, 0]
    found = np.take_along_axis(fits_BN, first_B1, axis=1)[:, 0]
    w = np.where(found, w, np.clip(np.rint(H * ratio[1]), 1, W))
    h = np.where(found, h, np.clip(np.rint(W / ratio[0]), 1, H))
    place_x, place_y = u_BU[:, 2 * _CROP_TRIES], u_BU[:, 2 * _CROP_TRIES + 1]
    x = np.where(found, np.floor(place_x * (W - w + 1)), (W - w) // 2)
    y = np.where(found, np.floor(place_y * (H - h + 1)), (H - h) // 2)
    crop_B4 = np.stack([x, y, w, h], axis=1) * ((W > 0) & (H > 0))[:, None]
    return crop_B4.astype(np.float32)


def centre_crops(width_B: Ints, height_B: Ints, share: float) -> NDArray[np.float32]:
    """Returns centred squares x, y, side, side in whole pixels; zeros for clips without a picture.

    The side is `share` of the shorter edge. A share of 0.875 gives the same region as a resize of the shorter edge to
    256 and a centre crop of 224 (SSW60, section 4.1), but crops before resizing.
    """
    side = np.rint(share * np.minimum(width_B, height_B))
    side = np.where((width_B > 0) & (height_B > 0), np.maximum(side, 1), 0)
    crop_B4 = np.stack([np.rint((width_B - side) / 2), np.rint((height_B - side) / 2), side, side], axis=1)
    return (crop_B4 * (side > 0)[:, None]).astype(np.float32)


def random_windows(length_B: Ints, window: int, u_B: Floats) -> NDArray[np.int32]:
    """Returns one window start per clip, uniform in [0, L - window], or 0 for shorter clips; shape [B, 1]."""
    return np.floor(u_B * (np.maximum(length_B - window, 0) + 1)).astype(np.int32)[:, None]


def fitting_windows(length_B: Ints, window: int, starts: Sequence[int]) -> NDArray[np.int32]:
    """Returns the starts whose window ends within the clip, and -1 for the others; shape [B, W].

    If none fits (a short clip, or one without audio), the first window starts at 0 and is padded at its end.
    """
    starts_W = np.asarray(starts, dtype=np.int64)
    fits_BW = starts_W + window <= length_B[:, None]
    starts_BW = np.where(fits_BW, starts_W, -1)
    starts_BW[~fits_BW.any(axis=1), 0] = 0
    return starts_BW.astype(np.int32)


def _weigh(sources: Sequence[tuple[Manifest, float]], sampling: Sampling) -> tuple[PlanSource, ...]:
    """Returns the sources with their share of each block and their class weights."""
    if not sources:
        raise UserError("the list of manifests is empty; expected at least one")
    for manifest, weight in sources:
        if not len(manifest):
            raise UserError(f"{manifest.path}: has no clips; expected at least one")
        if not (weight > 0 and math.isfinite(weight)):
            raise UserError(f"{manifest.path}: weight = {weight:g}: expected a positive number")
    counts = largest_remainder([weight for _, weight in sources], sampling.mix_block // sampling.repeat or 1)
    out = []
    for (manifest, weight), count in zip(sources, counts, strict=True):
        if not count:
            raise UserError(
                f"{manifest.path}: weight = {weight:g}: expected at least one clip in a block of "
                f"sampling.mix_block = {sampling.mix_block} samples; raise one of the two"
            )
        class_weight = _class_weights(manifest.class_counts()) if sampling.balance == "class" else None
        out.append(PlanSource(manifest, float(weight), len(manifest), int(count), class_weight))
    return tuple(out)


def _class_weights(counts_K: ArrayLike) -> Floats:
    """Returns N / (K_present * count) for each class, 0 for absent classes; N is the number of labels.

    The mean over the clips is 1 if all clips have the same number of labels.
    """
    counts = np.asarray(counts_K, dtype=np.float64)
    present = counts > 0
    return np.where(present, counts.sum() / (max(int(present.sum()), 1) * np.maximum(counts, 1)), 0.0)


def _beta(alpha: float, u_B: Floats) -> NDArray[np.float32]:
    """Returns Beta(alpha, alpha) variates: the inverse distribution function at the uniforms."""
    from scipy.special import betaincinv  # 0.4 s to import, and mixup is off by default

    return betaincinv(alpha, alpha, u_B).astype(np.float32)


def _check_range(start: int, count: int) -> None:
    if start < 0 or count < 1 or start + count > _MAX_NUMBER:
        raise UserError(
            f"samples {start} to {start + count}: expected a start of 0 or more, an end of at most 2^48 and at least "
            "one sample"
        )
