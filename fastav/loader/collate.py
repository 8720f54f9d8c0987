"""Collation of one batch: which clip is decoded into which row, and how incomplete rows are filled."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fastav.core.errors import MediaError, TooManyBroken
from fastav.data.clip import Clip, ClipPlan, PlanBatch
from fastav.loader.batch import Batch
from fastav.media.decoder import BatchDecoder, ClipDecoder, Sample

if TYPE_CHECKING:
    from fastav.data.plan import Plan

Request = tuple[str, int, int]
"""(`train` or `evaluate`, index of the first sample, number of samples)."""

_MAX_REASONS = 3  # reasons that an error message lists


@dataclass(eq=False, slots=True)
class DecodeTask:
    """One clip to decode for one or more rows of a batch."""

    job: BatchJob
    clip: Clip
    rows: list[int]
    plans: list[ClipPlan]
    error: MediaError | None = None
    prepared: Any = None  # what BatchDecoder.prepare returned


@dataclass(eq=False, slots=True)
class BatchJob:
    """A batch that is being decoded.

    Each worker writes to its own rows, so only `pending` needs a lock. `pending` counts the clips that are not decoded
    yet, plus one for the batch itself with a `BatchDecoder`.
    """

    plan: PlanBatch
    targets_BK: NDArray[np.float32]
    ids: list[str]
    frames_BTCHW: Tensor | None
    mel_BWCML: Tensor | None
    good_B: NDArray[np.bool_]
    has_video_B: NDArray[np.bool_]
    has_audio_B: NDArray[np.bool_]
    tasks: list[DecodeTask] = field(default_factory=list)
    pending: int = 0
    adopt: Callable[[], None] | None = None  # called by the consumer's thread, see DecodedBatch

    def store(self, row: int, sample: Sample, clip: Clip, floor: float) -> None:
        """Copies a decoded sample into its row and fills a missing modality.

        Args:
            row: Row of the batch.
            sample: Decoded frames and spectrogram.
            clip: The clip, for error messages.
            floor: Value of silence in the spectrogram, dB.

        Raises:
            MediaError: The shape differs from that of the batch, or the sample has no modality of this run.
        """
        has_video = _copy_or_fill(self.frames_BTCHW, row, sample.frames_TCHW, 0, clip, "video")
        has_audio = _copy_or_fill(self.mel_BWCML, row, sample.mel_WCML, floor, clip, "audio")
        if not has_video and not has_audio:
            raise MediaError(clip.source, "has none of the modalities that this run uses")
        self.has_video_B[row], self.has_audio_B[row], self.good_B[row] = has_video, has_audio, True


@dataclass(frozen=True, slots=True)
class Placeholder:
    """A good row that replaces broken clips and padding."""

    frames_TCHW: Tensor | None
    mel_WCML: Tensor | None
    has_video: bool
    has_audio: bool

    @classmethod
    def of(cls, job: BatchJob, row: int, *, copy: bool) -> Placeholder:
        """Takes a row of a job, as a copy that outlives the job or as a view."""
        frames = None if job.frames_BTCHW is None else job.frames_BTCHW[row]
        mel = None if job.mel_BWCML is None else job.mel_BWCML[row]
        if copy:
            frames, mel = (None if part is None else part.clone() for part in (frames, mel))
        return cls(frames, mel, bool(job.has_video_B[row]), bool(job.has_audio_B[row]))

    @classmethod
    def blank(cls, job: BatchJob, floor: float) -> Placeholder:
        """Makes black frames and silence, marked as present: attention over an empty sequence would be NaN."""
        frames = None if job.frames_BTCHW is None else torch.zeros_like(job.frames_BTCHW[0])
        mel = None if job.mel_BWCML is None else torch.full_like(job.mel_BWCML[0], floor)
        return cls(frames, mel, frames is not None, mel is not None)

    def fill(self, job: BatchJob, row: int) -> None:
        """Overwrites a row of a job. Windows repeat if the row has more of them (evaluation after training)."""
        if job.frames_BTCHW is not None and self.frames_TCHW is not None:
            job.frames_BTCHW[row].copy_(self.frames_TCHW)
        if job.mel_BWCML is not None and self.mel_WCML is not None:
            windows = torch.arange(job.mel_BWCML.shape[1], device=self.mel_WCML.device) % len(self.mel_WCML)
            job.mel_BWCML[row].copy_(self.mel_WCML[windows])
        job.has_video_B[row], job.has_audio_B[row] = self.has_video, self.has_audio


class Collator:
    """Turns requests into jobs, and decoded jobs into batches. The arguments are those of `Loader`.

    Attributes:
        broken: Samples delivered as placeholders because their clip could not be read.
        seen: Samples delivered, without padding.
        batch_decoder: The decoder if it decodes whole batches; None if it decodes clips.
    """

    def __init__(
        self,
        plan: Plan,
        decoder: ClipDecoder | BatchDecoder,
        *,
        modalities: Sequence[str],
        classes: Sequence[str],
        aliases: Mapping[str, str] | None,
        on_broken: Callable[[Clip, MediaError], None],
        pin_memory: bool,
    ) -> None:
        self.broken, self.seen, self.pin_memory = 0, 0, pin_memory
        self._plan, self._on_broken = plan, on_broken
        self._decoder = decoder if not isinstance(decoder, BatchDecoder) else None
        self.batch_decoder = decoder if isinstance(decoder, BatchDecoder) else None
        self._modalities, self._classes, self._aliases = tuple(modalities), tuple(classes), aliases
        self._frontend = decoder.spec.frontend
        self._floor = self._frontend.floor_db
        self._reported: set[tuple[int, str]] = set()
        self._reasons: list[str] = []
        self._last_good: Placeholder | None = None

    def job(self, request: Request) -> BatchJob:
        """Plans a batch: which clip is decoded into which rows, and all that needs no decoding, such as labels."""
        kind, start, count = request
        plan = {"train": self._plan.train, "evaluate": self._plan.evaluate}[kind](start, count)
        job = self._empty(plan)
        clips: dict[int, Clip] = {}
        for number, source in enumerate(self._plan.sources):
            where = np.flatnonzero((plan.sample_B >= 0) & (plan.source_B == number))
            if where.size:
                rows = plan.row_B[where]
                clips |= zip(where.tolist(), source.manifest.clips(rows), strict=True)
                job.targets_BK[where] = source.manifest.label_matrix(rows, self._classes, self._aliases)
        tasks: dict[tuple[int, int, bytes, bytes], DecodeTask] = {}
        for row, clip in sorted(clips.items()):
            job.ids[row] = clip.id
            one = plan[row]
            # Repeats of a clip with the same frames and windows share one decode.
            key = (one.source, one.row, one.frames_T.tobytes(), one.windows_W.tobytes())
            task = tasks.setdefault(key, DecodeTask(job, clip, [], []))
            task.rows.append(row)
            task.plans.append(one)
        job.tasks = list(tasks.values())
        job.pending = len(job.tasks) + (self.batch_decoder is not None)
        return job

    def _empty(self, plan: PlanBatch) -> BatchJob:
        num, sampling = len(plan), self._plan.sampling
        allocate = self.batch_decoder is None  # a batch decoder allocates its own output
        size = sampling.image_size
        frames = (num, plan.frames_BT.shape[1], 3, size, size)
        mel = (num, plan.windows_BW.shape[1], 1, self._frontend.num_mels, sampling.window)
        return BatchJob(
            plan=plan,
            targets_BK=np.zeros((num, len(self._classes)), np.float32),
            ids=[""] * num,
            frames_BTCHW=self._allocate(frames, torch.uint8) if allocate and "video" in self._modalities else None,
            mel_BWCML=self._allocate(mel, torch.float32) if allocate and "audio" in self._modalities else None,
            good_B=np.zeros(num, np.bool_),
            has_video_B=np.zeros(num, np.bool_),
            has_audio_B=np.zeros(num, np.bool_),
        )

    def _allocate(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, pin_memory=self.pin_memory)

    def decode(self, task: DecodeTask) -> None:
        """Decodes one clip into its rows, or prepares it for the batch decoder; thread-safe."""
        try:
            if self.batch_decoder is not None:
                task.prepared = self.batch_decoder.prepare(task.clip, task.plans)
                return
            assert self._decoder is not None, "the decoder is a ClipDecoder or a BatchDecoder"
            samples = self._decoder.decode(task.clip, task.plans)
            for row, sample in zip(task.rows, samples, strict=True):
                task.job.store(row, sample, task.clip, self._floor)
        except MediaError as error:
            # The frames of a traceback would keep samples alive, and with them the memory that they lie in.
            task.error = error.with_traceback(None)
            task.job.good_B[task.rows] = False

    def decode_batch(self, job: BatchJob) -> None:
        """Decodes a whole batch whose clips are prepared; thread-safe."""
        assert self.batch_decoder is not None, "only called with a BatchDecoder"
        decoded = self.batch_decoder.decode(
            [task.prepared for task in job.tasks],
            [task.rows for task in job.tasks],
            size=len(job.plan),
            frames=job.plan.frames_BT.shape[1],
            windows=job.plan.windows_BW.shape[1],
        )
        job.frames_BTCHW, job.mel_BWCML, job.adopt = decoded.frames_BTCHW, decoded.mel_BWCML, decoded.adopt
        job.has_video_B[:], job.has_audio_B[:] = decoded.has_video_B, decoded.has_audio_B
        for task, error in zip(job.tasks, decoded.errors, strict=True):
            task.error = task.error or error
            job.good_B[task.rows] = task.error is None
            task.prepared = None

    def batch(self, job: BatchJob, later: Iterator[BatchJob]) -> Batch:
        """Finishes a decoded job: counts, placeholders, small tensors. Called in the order of the requests.

        Args:
            job: A job with all tasks done.
            later: Iterator that waits for the following jobs. It is used only if the first batches have no good row.

        Returns:
            The batch on the CPU, in pinned memory with `pin_memory`.

        Raises:
            TooManyBroken: No clip could be read so far, nor in the prefetched batches.
        """
        plan = job.plan
        if job.adopt is not None:
            job.adopt()
        num_broken = int(((plan.sample_B >= 0) & ~job.good_B).sum())
        self._count(job, num_broken)
        self._fill_bad_rows(job, later)
        # A placeholder takes no part in mixup, on either side.
        mixed_B = job.good_B & job.good_B[plan.partner_B]
        small = {
            "targets_BK": job.targets_BK,
            "weight_B": np.where(job.good_B, plan.weight_B, 0).astype(np.float32),
            "has_video_B": job.has_video_B,
            "has_audio_B": job.has_audio_B,
            "flip_B": plan.flip_B,
            "band_B2": plan.band_B2.astype(np.int64),
            "mix_B": np.where(mixed_B, plan.mix_B, 1).astype(np.float32),
            "partner_B": plan.partner_B,
            "row_B": plan.row_B,
            "window_BW": plan.windows_BW >= 0,
        }
        tensors = {name: torch.from_numpy(array) for name, array in small.items()}
        if self.pin_memory:
            tensors = {name: tensor.pin_memory() for name, tensor in tensors.items()}
        window_BW = tensors.pop("window_BW")
        num_unique = sum(task.error is None for task in job.tasks)
        # A job and its tasks refer to each other. Breaking the cycle frees them now, not at some later garbage
        # collection, at each of which the allocator would keep a little (3 KiB a batch, measured over 3,000).
        job.tasks = []
        return Batch(
            frames_BTCHW=job.frames_BTCHW,
            mel_BWCML=job.mel_BWCML,
            window_BW=None if job.mel_BWCML is None else window_BW,
            **tensors,
            ids=job.ids,
            sample=int(plan.sample_B[0]),
            num_broken=num_broken,
            num_unique=num_unique,
        )

    def first_reasons(self) -> str:
        """Returns the first few reasons why clips could not be read, to be appended to a message."""
        return f": {'; '.join(self._reasons)}" if self._reasons else ""

    def _count(self, job: BatchJob, num_broken: int) -> None:
        """Counts samples and calls `on_broken` for clips not reported before, in the order of the plan."""
        self.broken += num_broken
        self.seen += int((job.plan.sample_B >= 0).sum())
        for task in job.tasks:
            key = (task.plans[0].source, task.clip.id)
            if task.error is not None and key not in self._reported:
                self._reported.add(key)
                if len(self._reasons) < _MAX_REASONS:
                    self._reasons.append(str(task.error))
                self._on_broken(task.clip, task.error)

    def _fill_bad_rows(self, job: BatchJob, later: Iterator[BatchJob]) -> None:
        """Copies good rows over rows of broken clips and of padding, which keeps the batch statistics natural.

        A batch without a good row takes one from the batch before it. The first batch takes one from the prefetched
        batches.
        """
        bad, good = np.flatnonzero(~job.good_B).tolist(), np.flatnonzero(job.good_B).tolist()
        if good:
            self._last_good = Placeholder.of(job, good[-1], copy=True)
            for i, row in enumerate(bad):
                Placeholder.of(job, good[i % len(good)], copy=False).fill(job, row)
            return
        placeholder = self._last_good
        if placeholder is None and job.tasks:
            ready = (other for other in later if other.good_B.any())
            placeholder = next((Placeholder.of(other, int(other.good_B.argmax()), copy=False) for other in ready), None)
            if placeholder is None:
                raise TooManyBroken(f"none of the first clips could be read{self.first_reasons()}")
        for row in bad:
            (placeholder or Placeholder.blank(job, self._floor)).fill(job, row)


def _copy_or_fill(batch: Tensor | None, row: int, part: Tensor | None, fill: float, clip: Clip, stage: str) -> bool:
    """Copies one modality of a sample into its row, or fills the row; returns whether the sample has it."""
    if batch is None:
        return False
    if part is None:
        batch[row].fill_(fill)
        return False
    if part.shape != batch.shape[1:]:
        got, expected = tuple(part.shape), tuple(batch.shape[1:])
        raise MediaError(clip.source, f"decoded to shape {got}, expected {expected}", stage)
    batch[row].copy_(part)
    return True
