"""What DALI computes of a batch, the same graph for a GPU and a CPU, and pipelines that outlive a sample they choke on.

Frames: encoded video -> the wanted frames -> each plan's crop -> bilinear resize with antialiasing, mirrored where
planned -> repeats. Sound: FLAC or WAV -> the stretch that windows look at -> power spectrogram -> mel bands -> dB.
`nvidia.dali` is imported when the first pipeline is built.

Settings that were found by trying (DALI 2.4, device "cpu"; against `augment.resize_crop` and `frontend.LogMel`):

* `slice` before `resize`, not `roi_start` in pixels: a region of interest is interpolated with pixels beyond its edges,
  which moved edge values of enlarged crops by up to 50 levels. Sliced first, the mean difference is 0.2 levels at 224
  pixels (worst 3) and 0.3 to 0.5 for noise shrunk to 32 pixels (worst 16). `INTERP_LINEAR` with `antialias` is
  `INTERP_TRIANGULAR`; without it the mean difference is 2 to 23. A region from 1 to 0 mirrors, at no cost.
* `frames` without repeats: at a repeated number the decoder opens the file again and decodes from its start (8.7
  instead of 3.7 to 5.2 ms for 4 MJPEG frames, each twice); `sequence_rearrange` repeats decoded frames.
* `window_fn` is always given, as long as the FFT, with zeros around a shorter window: DALI's own Hann is another.
* The power agrees with torchaudio's to 2e-6 to 6e-6 in the median, 8e-5 at the 99th percentile and 2e-4 at worst, in
  bands that barely touch one bin: the float32 band edges of both are about as far from float64. In decibels all presets
  agree to 2e-3. FFT sizes need not be powers of two.

The executor is DALI's default, the dynamic one. Its outputs stay valid as long as a tensor made of them lives, also
after later runs and after the pipeline is gone (tested on a CPU), so they are taken over without a copy; the copy that
puts rows in their places is the only one. Outputs are bound to the CUDA stream that is current in the caller.

Pipelines do not prefetch: several of them, driven by a thread each, overlap instead, and nothing is lost when one of
them fails. DALI gives Python's lock free while it works (a counting thread kept 97 % of its pace).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fastav.media.spectrogram import Frontend

_FAILURES = (RuntimeError, ValueError, IndexError)  # what DALI raises for samples that it cannot process


@dataclass(frozen=True, slots=True)
class PipelinePlace:
    """Where pipelines run.

    Attributes:
        device_id: Number of the GPU; None for the CPU.
        threads: Of one pipeline.
    """

    device_id: int | None
    threads: int

    def pipeline(self, capacity: int) -> Any:
        """Returns an empty pipeline for batches of up to `capacity` samples."""
        from nvidia.dali import Pipeline

        return Pipeline(batch_size=capacity, num_threads=self.threads, device_id=self.device_id, prefetch_queue_depth=1)


@dataclass(frozen=True, slots=True)
class VideoSample:
    """The video of a clip, ready to be decoded.

    Attributes:
        data: A media file, or what `mp4.wrap` makes.
        frames_U: Wanted frames of it, int32, distinct and ascending.
        places_T: Place among them of each planned frame, int32.
        boxes: left, top, right, bottom of each plan's crop, pixels of the decoded frame.
        flips: Whether each plan mirrors.
        frame_bytes: Of one decoded frame.
    """

    data: bytes
    frames_U: NDArray[np.int32]
    places_T: NDArray[np.int32]
    boxes: tuple[tuple[int, int, int, int], ...]
    flips: tuple[bool, ...]
    frame_bytes: int


@dataclass(frozen=True, slots=True)
class AudioSample:
    """The sound of a clip, ready to be decoded.

    Attributes:
        data: FLAC or WAV, at the spectrogram's rate.
        begin: First of the decoded samples that counts.
        count: Samples from there on.
        first: Mel frame of the clip that is centred on sample `begin`.
        total: Mel frames of the clip.
        starts_W: First mel frame of each window, -1 for none.
    """

    data: bytes
    begin: int
    count: int
    first: int
    total: int
    starts_W: NDArray[np.int32]


S = TypeVar("S")
S_contra = TypeVar("S_contra", contravariant=True)


class Graph(Protocol[S_contra]):
    """Defines pipelines and feeds them.

    Attributes:
        place: Where they run.
    """

    place: PipelinePlace

    def kind(self, samples: Sequence[S_contra]) -> int:
        """Returns which variant of the pipeline takes these samples."""
        ...

    def build(self, kind: int, capacity: int, samples: Sequence[S_contra]) -> Any:
        """Returns a pipeline of a variant; the samples hint at sizes."""
        ...

    def feed(self, pipeline: Any, kind: int, samples: Sequence[S_contra]) -> None:
        """Hands samples to a pipeline."""
        ...


class VideoGraph:
    """Frames [N, T, size, size, 3] uint8 of each plan of N clips; the variant is how many plans a clip has.

    Args:
        place: Where it runs.
        size: Height and width of the frames handed out.
    """

    def __init__(self, place: PipelinePlace, size: int) -> None:
        self.place, self.size = place, size

    def kind(self, samples: Sequence[VideoSample]) -> int:
        """See `Graph`: the largest number of plans."""
        return max(len(film.boxes) for film in samples)

    def build(self, kind: int, capacity: int, samples: Sequence[VideoSample]) -> Any:
        """See `Graph`."""
        from nvidia.dali import fn, types

        pipeline = self.place.pipeline(capacity)
        mixed: dict[str, Any] = {}
        if self.place.device_id is not None:
            # Pinned to cores, the threads of several processes of a machine would meet on the same ones.
            largest = max(len(film.frames_U) * film.frame_bytes for film in samples)
            mixed = {"affine": False, "bytes_per_sample_hint": largest}
        with pipeline:
            data = fn.external_source(name="data", dtype=types.UINT8, ndim=1)
            frames = fn.external_source(name="frames", dtype=types.INT32, ndim=1)
            places = fn.external_source(name="places", dtype=types.INT32, ndim=1)
            device = "cpu" if self.place.device_id is None else "mixed"
            seen = fn.decoders.video(data, frames=frames, device=device, pad_mode="none", **mixed)
            lanes = []
            for lane in range(kind):
                start, extent = (
                    fn.external_source(name=f"{name}{lane}", dtype=types.INT32, ndim=1) for name in ("start", "extent")
                )
                roi = [fn.external_source(name=f"{name}{lane}", dtype=types.FLOAT, ndim=1) for name in ("from", "to")]
                cropped = fn.slice(seen, start=start, shape=extent, axes=[1, 2])
                resized = fn.resize(
                    cropped,
                    size=[self.size, self.size],
                    roi_start=roi[0],
                    roi_end=roi[1],
                    roi_relative=True,
                    interp_type=types.INTERP_LINEAR,
                    antialias=True,
                )
                lanes.append(fn.sequence_rearrange(resized, new_order=places))
            pipeline.set_outputs(*lanes)
        pipeline.build()
        return pipeline

    def feed(self, pipeline: Any, kind: int, samples: Sequence[VideoSample]) -> None:
        """See `Graph`; a clip with fewer plans than others repeats its last one."""
        pipeline.feed_input("data", [np.frombuffer(film.data, np.uint8) for film in samples])
        pipeline.feed_input("frames", [film.frames_U for film in samples])
        pipeline.feed_input("places", [film.places_T for film in samples])
        for lane in range(kind):
            boxes_N4 = np.array([film.boxes[min(lane, len(film.boxes) - 1)] for film in samples], np.int32)
            flip_N = np.array([film.flips[min(lane, len(film.flips) - 1)] for film in samples], np.float32)
            start_N2 = boxes_N4[:, [1, 0]]
            pipeline.feed_input(f"start{lane}", np.ascontiguousarray(start_N2))
            pipeline.feed_input(f"extent{lane}", np.ascontiguousarray(boxes_N4[:, [3, 2]] - start_N2))
            pipeline.feed_input(f"from{lane}", np.stack([np.zeros_like(flip_N), flip_N], axis=1))
            pipeline.feed_input(f"to{lane}", np.stack([np.ones_like(flip_N), 1 - flip_N], axis=1))


class AudioGraph:
    """Log-mel spectrograms [N, M, L] float32 in dB of N clips' stretches of sound; L of the longest, then the floor.

    Args:
        place: Where it runs.
        frontend: Settings of the spectrogram.
    """

    def __init__(self, place: PipelinePlace, frontend: Frontend) -> None:
        self.place, self.frontend = place, frontend

    def kind(self, samples: Sequence[AudioSample]) -> int:
        """See `Graph`: there is one."""
        return 0

    def build(self, kind: int, capacity: int, samples: Sequence[AudioSample]) -> Any:
        """See `Graph`."""
        from nvidia.dali import fn, types
        from nvidia.dali import math as dali_math

        settings, pipeline = self.frontend, self.place.pipeline(capacity)
        db_per_decade = 20.0 / settings.power
        with pipeline:
            data = fn.external_source(name="data", dtype=types.UINT8, ndim=1)
            begin = fn.external_source(name="begin", dtype=types.INT32, ndim=1)
            count = fn.external_source(name="count", dtype=types.INT32, ndim=1)
            whole, _ = fn.decoders.audio(data, downmix=True, dtype=types.FLOAT)
            wave = fn.slice(whole, start=begin, shape=count, axes=[0])
            power = fn.spectrogram(
                wave if self.place.device_id is None else wave.gpu(),
                nfft=settings.n_fft,
                window_length=settings.n_fft,
                window_step=settings.hop_length,
                window_fn=_window(settings),
                power=1 if settings.power == 1 else 2,
                center_windows=True,
                reflect_padding=True,
            )
            if settings.power not in (1, 2):
                power = dali_math.pow(power, settings.power / 2)
            mel = fn.mel_filter_bank(
                power,
                nfilter=settings.num_mels,
                sample_rate=float(settings.sample_rate),
                freq_low=settings.f_min,
                freq_high=settings.f_max,
                mel_formula=settings.mel_scale,
                normalize=settings.norm == "slaney",
            )
            loud = fn.to_decibels(mel, multiplier=db_per_decade, reference=1.0, cutoff_db=settings.floor_db)
            pipeline.set_outputs(fn.pad(loud, axes=[1], fill_value=settings.floor_db))
        pipeline.build()
        return pipeline

    def feed(self, pipeline: Any, kind: int, samples: Sequence[AudioSample]) -> None:
        """See `Graph`."""
        pipeline.feed_input("data", [np.frombuffer(wave.data, np.uint8) for wave in samples])
        pipeline.feed_input("begin", np.array([[wave.begin] for wave in samples], np.int32))
        pipeline.feed_input("count", np.array([[wave.count] for wave in samples], np.int32))


def _window(settings: Frontend) -> list[float]:
    """The periodic Hann window in the middle of `n_fft` points, where torch puts it."""
    window = torch.zeros(settings.n_fft)
    begin = (settings.n_fft - settings.win_length) // 2
    window[begin : begin + settings.win_length] = torch.hann_window(settings.win_length, periodic=True)
    return [float(value) for value in window]


@dataclass(frozen=True, slots=True)
class GraphResults:
    """What became of samples.

    Attributes:
        parts: Numbers of the samples, and the pipeline's outputs [number of samples, ...], of each successful run.
        failed: Why the others cannot be processed, by number.
    """

    parts: list[tuple[list[int], list[Tensor]]]
    failed: dict[int, str]


class Engine(Generic[S]):
    """Runs batches through pipelines of a graph; used by one thread at a time.

    One sample that DALI cannot decode fails the whole batch, and DALI calls the pipeline invalid from then on. So it is
    dropped, and the samples are run one by one: each failure costs a new pipeline (5 ms on a CPU).

    Args:
        graph: What is computed.
    """

    def __init__(self, graph: Graph[S]) -> None:
        self.graph = graph
        self._built: dict[int, tuple[int, Any]] = {}  # capacity and pipeline by kind
        self._capacity = 1
        self._samples: list[S] = []
        self._running: Any = None
        self._error: Exception | None = None

    def start(self, samples: Sequence[S]) -> None:
        """Begins to process samples and returns at once; `finish` must follow."""
        if self._running is not None:  # nobody waited for the batch before: its outputs would pass for this one's
            self.close()
        self._samples = list(samples)
        self._capacity = max(self._capacity, len(self._samples))
        if self._samples:
            self._begin(self._samples)

    def finish(self) -> GraphResults:
        """Waits for what was started."""
        samples, self._samples = self._samples, []
        if not samples:
            return GraphResults([], {})
        outcome = self._collect()
        if not isinstance(outcome, str):
            return GraphResults([(list(range(len(samples))), outcome)], {})
        if len(samples) == 1:
            return GraphResults([], {0: outcome})
        results = GraphResults([], {})
        for number, sample in enumerate(samples):
            self._begin([sample])
            outcome = self._collect()
            if isinstance(outcome, str):
                results.failed[number] = outcome
            else:
                results.parts.append(([number], outcome))
        return results

    def close(self) -> None:
        """Frees the pipelines; they are built again when needed."""
        self._built.clear()
        self._running = None

    def _begin(self, samples: list[S]) -> None:
        self._running, self._error = None, None
        try:
            kind = self.graph.kind(samples)
            capacity, pipeline = self._built.get(kind, (0, None))
            if capacity < len(samples):
                self._built.pop(kind, None)  # free its memory before more is taken
                pipeline = self.graph.build(kind, self._capacity, samples)
                self._built[kind] = (self._capacity, pipeline)
            self.graph.feed(pipeline, kind, samples)
            pipeline.schedule_run()
            self._running = pipeline
        except _FAILURES as error:
            self._error = error

    def _collect(self) -> list[Tensor] | str:
        """Returns the outputs of what was begun, or why there are none."""
        pipeline, self._running = self._running, None
        if self._error is None:
            try:
                stream = None if self.graph.place.device_id is None else torch.cuda.current_stream()
                return [torch.from_dlpack(out.as_tensor()) for out in pipeline.outputs(cuda_stream=stream)]
            except _FAILURES as error:
                self._error = error
        self.close()
        return _reason(self._error)


def _reason(error: Exception) -> str:
    """The telling line of DALI's message, without the traceback of the graph and its own paths."""
    text = str(error)
    told = text.split("encountered:", 1)[-1].split("C++ context", 1)[0].split("Current pipeline", 1)[0]
    told = re.sub(r"Assert on \".*?\" failed:", "", told)
    return "DALI: " + (" ".join(told.split()) or type(error).__name__)
