"""DALI graphs for video and audio, the same on GPU and CPU, and an engine that runs batches through their pipelines.

Video: encoded video -> planned frames -> crop of each plan -> bilinear resize with antialiasing, mirrored if planned ->
repeated frames. Audio: FLAC or WAV -> samples that the windows need -> power spectrogram -> mel bands -> dB.
`nvidia.dali` is imported when the first pipeline is built.

Settings found by experiment (DALI 2.4, device "cpu", compared to `crop.resize_crop` and `spectrogram.LogMel`):

* `slice` is called before `resize`, instead of `roi_start` in pixels. A region of interest is interpolated with pixels
  beyond its edges, which changed edge values of enlarged crops by up to 50 levels. With `slice`, the mean difference is
  0.2 levels at 224 pixels (maximum 3), and 0.3 to 0.5 for noise reduced to 32 pixels (maximum 16). `INTERP_LINEAR` with
  `antialias` equals `INTERP_TRIANGULAR`; without `antialias` the mean difference is 2 to 23. A region from 1 to 0
  mirrors the picture at no cost.
* `frames` has no repeated numbers. For a repeated number, the decoder opens the file again and decodes from its start
  (8.7 instead of 3.7 to 5.2 ms for 4 MJPEG frames, each twice). `sequence_rearrange` repeats the decoded frames.
* `window_fn` is always given, in the length of the FFT, with zeros around a shorter window, because DALI's own Hann
  window is different.
* The power differs from torchaudio's by 2e-6 to 6e-6 (median), 8e-5 (99th percentile) and 2e-4 (maximum, in bands that
  overlap hardly one bin); both compute band edges in float32, with similar errors. The decibels of all presets differ
  by less than 2e-3. FFT sizes need not be powers of two.

The executor is DALI's default, the dynamic one. Its outputs stay valid as long as a tensor made from them exists, also
after later runs and after the pipeline is deleted (tested on a CPU). They are therefore used without a copy; the only
copy is the one into the rows of the batch. Outputs belong to the CUDA stream that is current in the caller.

Pipelines do not prefetch. Instead, several pipelines run in parallel, one per thread, and nothing is lost if one of
them fails. DALI releases Python's GIL while it works (a counting thread kept 97 % of its speed).
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

_FAILURES = (RuntimeError, ValueError, IndexError)  # errors that DALI raises for samples that it cannot process


@dataclass(frozen=True, slots=True)
class PipelinePlace:
    """The device on which pipelines run.

    Attributes:
        device_id: Number of the GPU; None for the CPU.
        threads: Number of CPU threads per pipeline.
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
        data: Content of a media file, or an MP4 made by `mp4_muxer.mux`.
        frames_U: Numbers of the frames to decode, int32, distinct and ascending.
        places_T: Index into `frames_U` of each planned frame, int32.
        boxes: left, top, right and bottom of each plan's crop, pixels of the decoded frame.
        flips: Whether each plan mirrors its frames left to right.
        frame_bytes: Size of one decoded frame, bytes.
    """

    data: bytes
    frames_U: NDArray[np.int32]
    places_T: NDArray[np.int32]
    boxes: tuple[tuple[int, int, int, int], ...]
    flips: tuple[bool, ...]
    frame_bytes: int


@dataclass(frozen=True, slots=True)
class AudioSample:
    """The audio of a clip, ready to be decoded.

    Attributes:
        data: FLAC or WAV file, at the sample rate of the spectrogram.
        begin: First decoded sample to use.
        count: Number of samples to use.
        first: Number of the clip's mel frame that is centred on sample `begin`.
        total: Number of mel frames of the clip.
        starts_W: First mel frame of each window; -1 for a window without audio.
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
    """Builds pipelines and feeds samples to them.

    Attributes:
        place: Device on which the pipelines run.
    """

    place: PipelinePlace

    def kind(self, samples: Sequence[S_contra]) -> int:
        """Returns the variant of the pipeline that can process the samples."""
        ...

    def build(self, kind: int, capacity: int, samples: Sequence[S_contra]) -> Any:
        """Returns a pipeline of a variant for up to `capacity` samples; the given samples show typical sizes."""
        ...

    def feed(self, pipeline: Any, kind: int, samples: Sequence[S_contra]) -> None:
        """Passes samples to a pipeline."""
        ...


class VideoGraph:
    """Decodes the frames of N clips: one output [N, T, size, size, 3] uint8 per plan.

    The variant is the number of plans per clip.

    Args:
        place: Device on which the pipelines run.
        size: Height and width of the output frames, pixels.
    """

    def __init__(self, place: PipelinePlace, size: int) -> None:
        self.place, self.size = place, size

    def kind(self, samples: Sequence[VideoSample]) -> int:
        """Returns the largest number of plans per clip."""
        return max(len(video.boxes) for video in samples)

    def build(self, kind: int, capacity: int, samples: Sequence[VideoSample]) -> Any:
        """Returns a pipeline for `kind` plans per clip and up to `capacity` clips."""
        from nvidia.dali import fn, types

        pipeline = self.place.pipeline(capacity)
        mixed: dict[str, Any] = {}
        if self.place.device_id is not None:
            # If threads were pinned to cores, those of several processes on a machine would share the same cores.
            largest = max(len(video.frames_U) * video.frame_bytes for video in samples)
            mixed = {"affine": False, "bytes_per_sample_hint": largest}
        with pipeline:
            data = fn.external_source(name="data", dtype=types.UINT8, ndim=1)
            frames = fn.external_source(name="frames", dtype=types.INT32, ndim=1)
            places = fn.external_source(name="places", dtype=types.INT32, ndim=1)
            device = "cpu" if self.place.device_id is None else "mixed"
            decoded = fn.decoders.video(data, frames=frames, device=device, pad_mode="none", **mixed)
            lanes = []  # one per plan
            for lane in range(kind):
                start, extent = (
                    fn.external_source(name=f"{name}{lane}", dtype=types.INT32, ndim=1) for name in ("start", "extent")
                )
                roi = [fn.external_source(name=f"{name}{lane}", dtype=types.FLOAT, ndim=1) for name in ("from", "to")]
                cropped = fn.slice(decoded, start=start, shape=extent, axes=[1, 2])
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
        """Passes samples to a pipeline. A clip with fewer plans than others repeats its last plan."""
        pipeline.feed_input("data", [np.frombuffer(video.data, np.uint8) for video in samples])
        pipeline.feed_input("frames", [video.frames_U for video in samples])
        pipeline.feed_input("places", [video.places_T for video in samples])
        for lane in range(kind):
            boxes_N4 = np.array([video.boxes[min(lane, len(video.boxes) - 1)] for video in samples], np.int32)
            flip_N = np.array([video.flips[min(lane, len(video.flips) - 1)] for video in samples], np.float32)
            start_N2 = boxes_N4[:, [1, 0]]
            pipeline.feed_input(f"start{lane}", np.ascontiguousarray(start_N2))
            pipeline.feed_input(f"extent{lane}", np.ascontiguousarray(boxes_N4[:, [3, 2]] - start_N2))
            pipeline.feed_input(f"from{lane}", np.stack([np.zeros_like(flip_N), flip_N], axis=1))
            pipeline.feed_input(f"to{lane}", np.stack([np.ones_like(flip_N), 1 - flip_N], axis=1))


class AudioGraph:
    """Computes log-mel spectrograms [N, M, L], float32, dB, of N clips.

    L is that of the longest clip; shorter ones are padded with the floor value.

    Args:
        place: Device on which the pipelines run.
        frontend: Settings of the spectrogram.
    """

    def __init__(self, place: PipelinePlace, frontend: Frontend) -> None:
        self.place, self.frontend = place, frontend

    def kind(self, samples: Sequence[AudioSample]) -> int:
        """Returns 0, the only variant."""
        return 0

    def build(self, kind: int, capacity: int, samples: Sequence[AudioSample]) -> Any:
        """Returns a pipeline for up to `capacity` clips."""
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
            mel_db = fn.to_decibels(mel, multiplier=db_per_decade, reference=1.0, cutoff_db=settings.floor_db)
            pipeline.set_outputs(fn.pad(mel_db, axes=[1], fill_value=settings.floor_db))
        pipeline.build()
        return pipeline

    def feed(self, pipeline: Any, kind: int, samples: Sequence[AudioSample]) -> None:
        """Passes samples to a pipeline."""
        pipeline.feed_input("data", [np.frombuffer(audio.data, np.uint8) for audio in samples])
        pipeline.feed_input("begin", np.array([[audio.begin] for audio in samples], np.int32))
        pipeline.feed_input("count", np.array([[audio.count] for audio in samples], np.int32))


def _window(settings: Frontend) -> list[float]:
    """Returns the periodic Hann window, centred in `n_fft` points as PyTorch does."""
    window = torch.zeros(settings.n_fft)
    begin = (settings.n_fft - settings.win_length) // 2
    window[begin : begin + settings.win_length] = torch.hann_window(settings.win_length, periodic=True)
    return [float(value) for value in window]


@dataclass(frozen=True, slots=True)
class GraphResults:
    """Results of the samples of a batch.

    Attributes:
        parts: For each successful run: numbers of its samples, and outputs of the pipeline [number of samples, ...].
        failed: Reason of each failed sample, by its number.
    """

    parts: list[tuple[list[int], list[Tensor]]]
    failed: dict[int, str]


class Engine(Generic[S]):
    """Runs batches through the pipelines of a graph. Used by one thread at a time.

    If DALI cannot decode one sample, the whole batch fails and the pipeline cannot be used again. The pipeline is then
    deleted, and the samples are run one by one. Each failure costs a new pipeline (5 ms on a CPU).

    Args:
        graph: The graph.
    """

    def __init__(self, graph: Graph[S]) -> None:
        self.graph = graph
        self._built: dict[int, tuple[int, Any]] = {}  # variant -> capacity and pipeline
        self._capacity = 1
        self._samples: list[S] = []
        self._running: Any = None
        self._error: Exception | None = None

    def start(self, samples: Sequence[S]) -> None:
        """Starts to process samples and returns immediately. Call `finish` afterwards."""
        if self._running is not None:  # `finish` was not called: its outputs would be returned for this batch
            self.close()
        self._samples = list(samples)
        self._capacity = max(self._capacity, len(self._samples))
        if self._samples:
            self._begin(self._samples)

    def finish(self) -> GraphResults:
        """Waits for the started samples and returns their results."""
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
        """Frees the pipelines. They are built again when needed."""
        self._built.clear()
        self._running = None

    def _begin(self, samples: list[S]) -> None:
        self._running, self._error = None, None
        try:
            kind = self.graph.kind(samples)
            capacity, pipeline = self._built.get(kind, (0, None))
            if capacity < len(samples):
                self._built.pop(kind, None)  # free its memory before allocating more
                pipeline = self.graph.build(kind, self._capacity, samples)
                self._built[kind] = (self._capacity, pipeline)
            self.graph.feed(pipeline, kind, samples)
            pipeline.schedule_run()
            self._running = pipeline
        except _FAILURES as error:
            self._error = error

    def _collect(self) -> list[Tensor] | str:
        """Returns the outputs of the running batch, or the reason of its failure."""
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
    """Returns the cause from DALI's error message, without its paths and the trace of the graph."""
    text = str(error)
    cause = text.split("encountered:", 1)[-1].split("C++ context", 1)[0].split("Current pipeline", 1)[0]
    cause = re.sub(r"Assert on \".*?\" failed:", "", cause)
    return "DALI: " + (" ".join(cause.split()) or type(error).__name__)
