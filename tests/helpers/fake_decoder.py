"""A plan and a decoder of the tests' own making, to see what the loader does with them."""

import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fastav.core.errors import MediaError
from fastav.data.clip import Clip, ClipPlan, PlanBatch
from fastav.loader.batch import Batch
from fastav.loader.loader import Loader, Loading
from fastav.media.decoder import DecodeSpec, Sample
from fastav.media.spectrogram import Frontend

T, SIZE, MELS, WINDOW = 2, 4, 3, 5
FRONTEND = Frontend(num_mels=MELS, floor_db=-80.0)
CLASSES = ("a", "b", "c")


@dataclass
class FakeSampling:
    image_size: int = SIZE
    window: int = WINDOW


class FakeManifest:
    def __init__(self, clips: Sequence[Clip]) -> None:
        self.rows = list(clips)

    def clips(self, rows: Sequence[int]) -> list[Clip]:
        return [self.rows[int(row)] for row in rows]

    def label_matrix(
        self, rows: Sequence[int], classes: Sequence[str], aliases: Mapping[str, str] | None
    ) -> np.ndarray:
        known = aliases or {}
        labels = [[known.get(label, label) for label in self.rows[int(row)].labels] for row in rows]
        return np.array([[name in row for name in classes] for row in labels], np.float32)


@dataclass
class FakeSource:
    manifest: FakeManifest


class FakePlan:
    """Sample s is replica s % repeat of clip s // repeat (modulo the clips)."""

    def __init__(self, clips: Sequence[Clip], repeat: int = 1, mixup: bool = False, split: int = 0) -> None:
        parts = [clips[:split], clips[split:]] if split else [clips]
        self.sources = [FakeSource(FakeManifest(part)) for part in parts]
        self.sampling = FakeSampling()
        self.num, self.repeat, self.mixup, self.split = len(clips), repeat, mixup, split
        self.planned: list[tuple[int, int]] = []

    def train(self, start: int, count: int) -> PlanBatch:
        self.planned.append((start, count))
        sample_B = np.arange(start, start + count)
        plan = self.plan_at(sample_B, sample_B // self.repeat % self.num, windows=1)
        if self.mixup:
            mix_B = np.full(count, 0.25, np.float32)
            plan = replace(plan, mix_B=mix_B, partner_B=np.arange(count) ^ 1)
        return plan

    def evaluate(self, start: int, count: int) -> PlanBatch:
        sample_B = np.arange(start, start + count)
        real_B = sample_B < self.num
        plan = self.plan_at(np.where(real_B, sample_B, -1), np.where(real_B, sample_B, 0), windows=2)
        return replace(plan, weight_B=real_B.astype(np.float32))

    def plan_at(self, sample_B: np.ndarray, clip_B: np.ndarray, windows: int) -> PlanBatch:
        num = len(sample_B)
        source_B = (clip_B >= self.split).astype(np.int64) if self.split else np.zeros(num, np.int64)
        return PlanBatch(
            sample_B=sample_B.astype(np.int64),
            source_B=source_B,
            row_B=(clip_B - self.split * source_B).astype(np.int64),
            replica_B=(sample_B % self.repeat).astype(np.int64),
            frames_BT=np.stack([clip_B, clip_B + 1], 1).astype(np.int32),
            crop_B4=np.tile(np.float32([0, 0, SIZE, SIZE]), (num, 1)),
            flip_B=sample_B % 2 == 1,
            windows_BW=np.stack([clip_B, -np.ones_like(clip_B)], 1)[:, :windows].astype(np.int32),
            band_B2=np.stack([sample_B, sample_B], 1).astype(np.int32),
            mix_B=np.ones(num, np.float32),
            partner_B=np.arange(num),
            weight_B=np.full(num, 0.5, np.float32),
        )


class FakeDecoder:
    """Paints a clip's number; `act` may wait, raise, or return something else."""

    name = "fake"
    spec = DecodeSpec(image_size=SIZE, frontend=FRONTEND, window=WINDOW)

    def __init__(self, act: Callable[[Clip, Sequence[ClipPlan]], list[Sample] | None] | None = None) -> None:
        self.act = act
        self.calls: list[str] = []
        self.torch_threads: set[int] = set()

    def decode(self, clip: Clip, plans: Sequence[ClipPlan]) -> list[Sample]:
        self.calls.append(clip.id)
        self.torch_threads.add(torch.get_num_threads())
        if self.act is not None and (done := self.act(clip, plans)) is not None:
            return done
        return [paint(clip, plan) for plan in plans]


def paint(clip: Clip, plan: ClipPlan) -> Sample:
    frames = torch.full((T, 3, SIZE, SIZE), int(clip.id) % 256, dtype=torch.uint8)
    frames[0, 0, 0, 0] = plan.replica
    mel = torch.full((len(plan.windows_W), 1, MELS, WINDOW), -float(clip.id))
    return Sample(frames if clip.video else None, mel if clip.audio else None)


def make_clips(num: int, **fields: Any) -> list[Clip]:
    def one(i: int) -> Clip:
        path = Path(f"/media/{i}.mp4")
        return Clip(**{"id": str(i), "row": i, "video": path, "audio": path, "labels": ("abc"[i % 3],)} | fields)

    return [one(i) for i in range(num)]


def refuse(*ids: int) -> Callable[[Clip, Sequence[ClipPlan]], None]:
    def act(clip: Clip, plans: Sequence[ClipPlan]) -> None:
        if int(clip.id) in ids:
            raise MediaError(f"/media/{clip.id}.mp4", "moov atom not found", "open")

    return act


def make_loader(plan: FakePlan, decoder: FakeDecoder | None = None, **options: Any) -> Loader:
    told: list[tuple[Clip, MediaError]] = options.pop("told", [])
    given = {
        "modalities": ("video", "audio"),
        "classes": CLASSES,
        "on_broken": lambda clip, error: told.append((clip, error)),
    }
    config = Loading(**{"workers": 3} | {k: options.pop(k) for k in list(options) if k in Loading.__struct_fields__})
    return Loader(plan, decoder or FakeDecoder(), config, **given | options)  # type: ignore[arg-type]


def train_requests(batch: int, num: int) -> list[tuple[str, int, int]]:
    return [("train", i * batch, batch) for i in range(num)]


def our_threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("fastav-")]


def same(one: Batch, other: Batch) -> bool:
    for name in Batch.__dataclass_fields__:
        a, b = getattr(one, name), getattr(other, name)
        if not (torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b):
            return False
    return True
