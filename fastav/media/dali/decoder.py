"""The decoder for NVIDIA GPUs: DALI decodes, crops and resizes whole batches and computes their spectrograms.

`prepare` reads the data of one clip (bytes and small arrays). Any number of threads may call it. `decode` turns the
prepared clips of a batch into tensors on the device. Several threads may call it, too: each call uses one of
`pipelines` pairs of pipelines (video, audio), or waits for one. It blocks its thread but releases Python's GIL. So the
loader runs one thread per pair of pipelines; each decodes whole batches whose clips are prepared, and batches may
finish out of order. A batch is complete when `decode` returns. The consumer then calls `DecodedBatch.adopt` on the CUDA
stream that it uses.

What DALI decodes:

* Packed video: the needed access units in an MP4 file made in memory (`fastav.media.mp4_muxer` gives the reason). DALI
  also opens bare streams of MJPEG and of H.264 in Annex B, but parses them several times.
* Media files of clips that start at the start of the file, if DALI numbers the frames as the manifest does (every
  packet is one frame with its own timestamp) and shows them as PyAV does (upright, 8-bit 4:2:0, BT.601, which DALI
  assumes for all video). DALI decodes from the start of the file to the last planned frame, so packed clips are much
  faster.
* Packed audio: the FLAC frames that the windows need, after a header with their number of samples. With the header of
  the whole clip, libsndfile rejects a stream that ends early; with this header it gives exactly the same samples. Other
  audio (other sample rates, AAC, more than two channels) is decoded and resampled by PyAV and passed to DALI as a WAV
  file of float32.

What PyAV decodes in `prepare`: clips within a file, still pictures, rotated video, BT.709 video, and codecs and sizes
that the device does not support. DALI supports no H.264 on a CPU and no MJPEG on a GPU, so PyAV decodes such packs. It
also decodes the share `hybrid` of all clips. Windows of stored spectrograms are also cut in `prepare`.

Compared to PyAV with `crop.resize_crop`, frames differ by less than 2 levels on average: colour and chroma are rounded
differently (MJPEG 1.4, VP9 1.7 levels before resizing), and resizing adds 0.2 to 0.5. Spectrograms differ by less than
2e-3 dB (`fastav.media.dali.graph`).

A clip that DALI cannot decode makes its batch fail. The batch is then run clip by clip in new pipelines: the failing
clips are reported, and the others give the same result as in a batch without them. If all clips fail, decoding a test
video shows whether the clips or DALI caused it, such as a GPU out of memory. Packed bytes are checked against their CRC
before. Damage that FFmpeg's decoders conceal, such as a truncated JPEG in a raw file, is not reported by DALI either.

Device "gpu" has not been measured, because no GPU was available. It uses the same graph with the decoder "mixed" and
all later steps on the GPU; the reasons for its settings come from DALI's source and issues. Check first: NVDEC on
spliced GOPs (`idr_pic_id` of x264 may repeat at a splice; packs have access unit delimiters there), and clips per
second for 1, 2 and 3 pipelines and different numbers of threads. According to its source, DALI reuses NVDEC sessions
only for sizes that are multiples of 16, as in packs. If NVDEC returns fewer frames than the header gives, the missing
frames are uninitialised memory, without an error. So pictures must be compared; it is not enough to count failures.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.util
import io
import queue
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path
from typing import Any, Literal

import av
import av.error
import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from fastav.core.config import Fraction as Share
from fastav.core.config import Kind, NonNegativeInt, PositiveInt
from fastav.core.errors import FastavError, MediaError, UserError
from fastav.core.machine import num_cores
from fastav.data.clip import Clip, ClipPlan
from fastav.media import mp4_muxer
from fastav.media.crop import crop_box
from fastav.media.dali.audio import AudioSpan, trimmed_flac, wav_of
from fastav.media.dali.batch import DeviceBatch, PreparedClip
from fastav.media.dali.graph import (
    AudioGraph,
    AudioSample,
    Engine,
    Graph,
    GraphResults,
    PipelinePlace,
    VideoGraph,
    VideoSample,
)
from fastav.media.decoder import DecodedBatch, DecodeSpec
from fastav.media.demux import read_media
from fastav.media.open_file import TIME_TOLERANCE_S, first_stream, frame_times_s, media_errors, open_media
from fastav.media.packed_clip_decoder import decode_waveform
from fastav.media.pyav import PyAV, PyAVDecoder
from fastav.media.shards import FetchedClip, ShardReader, SplicedAudio, SplicedFrames
from fastav.media.x264 import SAME_BYTES

Device = Literal["auto", "gpu", "cpu"]

NVDEC_ENGINES = {"A100": 5, "H100": 7, "H200": 7, "GH200": 7, "L4": 4}
"""Number of video decoders of a GPU, by a word of its name."""

_OTHER_ENGINES = 2
_THREADS_AN_ENGINE = 2
_GOLDEN = (5**0.5 - 1) / 2

_LEAST: dict[str, dict[str, tuple[int, int]]] = {
    # Minimum width and height that NVDEC supports. AV1 is missing because only the L4 of the GPUs above supports it.
    # MJPEG is missing because DALI 2.4 rejects it on the GPU, although it is documented.
    "gpu": {"h264": (48, 16), "hevc": (144, 144), "vp8": (48, 16), "vp9": (128, 128)},
    "cpu": {"mjpeg": (16, 16), "vp8": (16, 16), "vp9": (16, 16)},
}
_CONTAINERS = frozenset({"mov,mp4,m4a,3gp,3g2,mj2", "matroska,webm"})
_PIXELS = frozenset({"yuv420p", "yuvj420p"})
_BT601 = frozenset({2, 5, 6})  # FFmpeg's numbers; 2 is unspecified
_LARGEST_FILE_BYTES = 1 << 26
_TRIAL_SIDE, _TRIAL_LEVELS = 128, 8
TRIAL_GREYS = (40, 90, 140, 190)
"""Grey levels of the frames of the test video."""


class Dali(Kind, frozen=True, tag="dali"):
    """NVIDIA DALI: decodes whole batches on the GPU.

    Attributes:
        device: Where DALI decodes: `gpu` uses NVDEC and CUDA, `cpu` runs the same graph on the CPU, `auto` uses the GPU
            if there is one.
        threads: Number of CPU threads per pipeline; 0 for two per video decoder of the GPU, or one per core with device
            `cpu`.
        pipelines: Number of batches that are decoded at the same time.
        hybrid: Share of the clips whose video the workers of the loader decode with PyAV, to relieve the GPU: 0 for
            none, 1 for all. The choice depends only on the number of the sample.
    """

    device: Device = "auto"
    threads: NonNegativeInt = 0
    pipelines: PositiveInt = 2
    hybrid: Share = 0.0

    def build(self, spec: DecodeSpec) -> DaliDecoder:
        """Returns the decoder for a run, on the current CUDA device.

        Raises:
            UserError: A requirement of DALI is missing, or the settings of the frontend contradict each other.
            FastavError: DALI is installed but does not work.
        """
        return DaliDecoder(self, spec)


def missing_requirement(device: Device) -> str:
    """Returns the requirement of DALI that is missing on this machine, one line; empty if none. Does not load DALI."""
    try:
        found = importlib.util.find_spec("nvidia.dali")
    except ModuleNotFoundError:
        found = None
    if found is None:
        return "the package nvidia-dali-cuda130 is not installed (pip install 'fastav[dali]')"
    if device_kind(device) == "cpu":
        return ""
    if not torch.cuda.is_available():
        return "PyTorch finds no CUDA device"
    try:
        ctypes.CDLL("libnvcuvid.so.1")
    except OSError:
        needed = "NVIDIA_DRIVER_CAPABILITIES=compute,video,utility"
        return f"libnvcuvid.so.1, the video decoder of the driver, is missing (a container needs {needed})"
    return ""


@functools.cache
def self_test_failure(device: Device) -> str:
    """Decodes a test video with DALI once, and returns the reason if it fails; empty if DALI works."""
    place = PipelinePlace(None if device_kind(device) == "cpu" else torch.cuda.current_device(), 2)
    slot = Slot(place, DecodeSpec(("video",), _TRIAL_SIDE))
    with slot.current():
        return slot.self_test(device_kind(device))


class DaliDecoder:
    """Decodes batches. The module's docstring describes which threads may call which method.

    Args:
        config: Settings of the decoder.
        spec: What to decode.
    """

    name = "dali"

    def __init__(self, config: Dali, spec: DecodeSpec) -> None:
        lack = missing_requirement(config.device)
        if lack:
            raise UserError(f'decode.kind "dali" with device "{config.device}": {lack}')
        self.config, self.spec, self.kind = config, spec, device_kind(config.device)
        if spec.frontend.factory:
            raise UserError(
                'frontend.factory: decode.kind "dali" computes the log-mel spectrogram itself; use "pyav" or "auto"'
            )
        spec.frontend.build()  # raises an error if its settings contradict each other
        self.device = torch.device("cpu") if self.kind == "cpu" else torch.device("cuda", torch.cuda.current_device())
        self.threads = config.threads or num_threads(self.device)
        self._shards = ShardReader(spec.reading)
        # Decoders for what DALI does not support. The first two decode one modality each, so nothing is decoded twice.
        self._video_fallback, self._audio_fallback, self._full_fallback = (
            PyAVDecoder(
                PyAV(), DecodeSpec(some, spec.image_size, spec.frontend, spec.window, spec.reading), self._shards
            )
            for some in (("video",), ("audio",), spec.modalities)
        )
        self._slots: queue.LifoQueue[Slot] = queue.LifoQueue()
        for _ in range(config.pipelines):
            self._slots.put(Slot(PipelinePlace(self.device.index, self.threads), spec))
        with self._slot() as slot:
            why = slot.self_test(self.kind)
        if why:
            raise FastavError(f'decode.kind "dali" with device "{config.device}" does not work on this machine: {why}')

    @property
    def batches_at_once(self) -> int:
        """Number of batches that are decoded at the same time."""
        return self.config.pipelines

    def prepare(self, clip: Clip, plans: Sequence[ClipPlan]) -> PreparedClip:
        """Reads the data that decoding a clip needs. May be called from any number of threads.

        Args:
            clip: A probed row of a manifest.
            plans: Plans of the replicas of one clip: the same frames and windows, different crops and flips.

        Raises:
            MediaError: The file does not match its manifest row; names file and stage.
        """
        with_video = "video" in self.spec.modalities and clip.has_video
        uses_audio = "audio" in self.spec.modalities
        with_samples = uses_audio and clip.num_samples > 0 and clip.mel is None
        starts_W = plans[0].windows_W
        span = self._audio_span(clip, starts_W) if with_samples else None
        numbers_U = _distinct(clip, plans[0]) if with_video else None
        wanted_U = None if _decoded_by_worker(plans[0].sample, self.config.hybrid) else numbers_U
        packed = self._fetch(clip, wanted_U, span) if clip.shard else FetchedClip()
        video = None if wanted_U is None else self._video_sample(clip, plans, wanted_U, packed.frames)
        pictures = audio = mel_WCML = None
        if with_video and video is None:
            samples = self._video_fallback.decode(clip, plans)
            pictures = tuple(sample.frames_TCHW for sample in samples if sample.frames_TCHW is not None)
        if with_samples and span is None:  # no window contains any part of the clip
            shape = len(starts_W), 1, self.spec.frontend.num_mels, self.spec.window
            mel_WCML = torch.full(shape, self.spec.frontend.floor_db)
        elif span is not None:
            audio = self._audio_sample(clip, span, starts_W, packed.audio)
        elif uses_audio and clip.num_mel_frames:
            mel_WCML = self._audio_fallback.decode(clip, plans[:1])[0].mel_WCML
        if video is None and pictures is None and audio is None and mel_WCML is None:
            raise MediaError(clip.source, f"has no {' and no '.join(self.spec.modalities)}")
        return PreparedClip(clip, tuple(plans), video, pictures, audio, mel_WCML)

    def decode(
        self,
        prepared: Sequence[PreparedClip | None],
        rows: Sequence[Sequence[int]],
        *,
        size: int,
        frames: int,
        windows: int,
    ) -> DecodedBatch:
        """Decodes a batch. May be called from several threads; `pipelines` of them decode at the same time.

        Args:
            prepared: Prepared clips; None for a clip that could not be prepared.
            rows: Row of the batch of each plan of each clip; other rows stay blank.
            size: Number of rows of the batch.
            frames: Number of frames per clip.
            windows: Number of spectrogram windows per clip.

        Raises:
            FastavError: DALI no longer works, with any clip.
        """
        with self._slot() as slot:
            batch = DeviceBatch(self.spec, self.device, prepared, rows, size, frames, windows)
            slot.video.start([clip.video for clip in batch.clips if clip.video is not None])
            slot.audio.start([clip.audio for clip in batch.clips if clip.audio is not None])
            batch.copy_finished()  # while DALI decodes
            video, audio = slot.video.finish(), slot.audio.finish()
            if any(len(results.failed) > 1 and not results.parts for results in (video, audio)):
                why = slot.self_test(self.kind)
                if why:
                    raise FastavError(f"DALI stopped working: {why}")
            batch.take_videos(video)
            batch.take_audio(audio)
            batch.retry(self._full_fallback.decode)
            return batch.finish()

    def close(self) -> None:
        """Waits for batches that are being decoded, and frees the pipelines."""
        slots = [self._slots.get() for _ in range(self.config.pipelines)]
        for slot in slots:
            slot.video.close()
            slot.audio.close()
            self._slots.put(slot)

    @contextmanager
    def _slot(self) -> Iterator[Slot]:
        """Reserves one pair of pipelines and makes its CUDA stream the current one."""
        slot = self._slots.get()
        try:
            with slot.current():
                yield slot
        finally:
            self._slots.put(slot)

    def _audio_span(self, clip: Clip, starts_W: NDArray[np.int32]) -> AudioSpan | None:
        """Returns the range of samples that the windows need, at the sample rate of the spectrogram."""
        frontend = self.spec.frontend
        count = round(clip.num_samples * frontend.sample_rate / clip.sample_rate)
        return AudioSpan.of(frontend, starts_W, self.spec.window, count)

    def _is_direct(self, clip: Clip) -> bool:
        """Returns True if DALI decodes the audio of a packed clip to the same samples as PyAV."""
        frontend = self.spec.frontend
        same = clip.sample_rate == frontend.sample_rate and clip.channels <= 2  # both mix two channels to their mean
        return same and clip.num_samples > frontend.n_fft // 2

    def _fetch(self, clip: Clip, numbers_U: NDArray[np.int32] | None, span: AudioSpan | None) -> FetchedClip:
        """Reads the parts of a packed clip that DALI or `_audio_sample` decodes."""
        fits = clip.video_codec in mp4_muxer.FOURCC and can_decode(self.kind, clip.video_codec, clip.width, clip.height)
        numbers = numbers_U.tolist() if numbers_U is not None and fits else None
        samples = None
        if span is not None:
            samples = (span.begin, span.end) if self._is_direct(clip) else (0, clip.num_samples)
        return FetchedClip() if numbers is None and samples is None else self._shards.fetch(clip, numbers, samples)

    def _video_sample(
        self, clip: Clip, plans: Sequence[ClipPlan], numbers_U: NDArray[np.int32], spliced: SplicedFrames | None
    ) -> VideoSample | None:
        """Returns the video of a clip for DALI; None if PyAV must decode it."""
        if spliced is not None:
            check_size(spliced, clip)
            data = mp4_muxer.mux(spliced.codec, spliced.units, spliced.keys, clip.width, clip.height)
            frames_U = np.array(spliced.shown, np.int32)
        else:
            whole = _whole_file(clip, self.kind)
            if whole is None:
                return None
            data, frames_U = whole, numbers_U
        return VideoSample(
            data=data,
            frames_U=frames_U,
            places_T=np.searchsorted(numbers_U, plans[0].frames_T).astype(np.int32),
            boxes=tuple(crop_box(plan.crop, clip.height, clip.width) for plan in plans),
            flips=tuple(plan.flip for plan in plans),
            frame_bytes=3 * clip.width * clip.height,
        )

    def _audio_sample(
        self, clip: Clip, span: AudioSpan, starts_W: NDArray[np.int32], packed: SplicedAudio | None
    ) -> AudioSample:
        """Returns the audio of a clip for DALI: the packed FLAC frames, or samples decoded and resampled by PyAV."""
        if packed is not None and self._is_direct(clip):
            begin, count = span.begin - packed.start, span.end - span.begin
            return AudioSample(trimmed_flac(packed, clip), begin, count, span.first, span.total, starts_W)
        frontend = self.spec.frontend
        with media_errors(clip.source, "audio"):
            if packed is not None:
                wave_CS = decode_waveform(packed, clip, frontend.sample_rate)
            else:
                audio = read_media(clip, None, True)
                assert audio is not None, "audio was requested"
                wave_CS = audio.waveform(frontend.sample_rate)
        wave_S = wave_CS[0].numpy()
        wave_S = np.pad(wave_S, (0, max(frontend.n_fft // 2 + 1 - len(wave_S), 0)))[span.begin : span.end]
        return AudioSample(wav_of(wave_S, frontend.sample_rate), 0, len(wave_S), span.first, span.total, starts_W)


class Slot:
    """A pair of pipelines, and the CUDA stream on which their batches are assembled."""

    def __init__(self, place: PipelinePlace, spec: DecodeSpec) -> None:
        self.place, self.spec = place, spec
        self.video: Engine[VideoSample] = Engine(VideoGraph(place, spec.image_size))
        self.audio: Engine[AudioSample] = Engine(AudioGraph(place, spec.frontend))
        self._stream = None if place.device_id is None else torch.cuda.Stream(place.device_id)

    @contextmanager
    def current(self) -> Iterator[None]:
        """Makes the device and the stream of this slot those of the calling thread."""
        if self._stream is None:
            yield
            return
        with torch.cuda.device(self.place.device_id), torch.cuda.stream(self._stream):
            yield

    def self_test(self, kind: str) -> str:
        """Decodes test samples in separate pipelines. Returns the reason if that fails; empty if it works."""
        frontend = self.spec.frontend
        silence_S = np.zeros(4 * frontend.n_fft, np.float32)
        starts_W = np.zeros(1, np.int32)
        audio = AudioSample(wav_of(silence_S, frontend.sample_rate), 0, len(silence_S), 0, 1, starts_W)
        tests: list[tuple[Graph[Any], Any]] = []
        if "audio" in self.spec.modalities:
            tests.append((AudioGraph(self.place, frontend), audio))
        if "video" in self.spec.modalities:
            tests.append(
                (VideoGraph(self.place, self.spec.image_size), trial_video("h264" if kind == "gpu" else "mjpeg"))
            )
        for graph, sample in tests:
            engine: Engine[Any] = Engine(graph)
            try:
                engine.start([sample])
                results = engine.finish()
            except ImportError as error:
                return f"nvidia.dali cannot be loaded ({error})"
            if results.failed:
                return results.failed[0]
            if isinstance(sample, VideoSample) and (wrong := _wrong_pictures(results)):
                return wrong
        return ""


def device_kind(device: Device) -> Literal["gpu", "cpu"]:
    """Returns the device that a setting selects on this machine."""
    if device == "auto":
        return "gpu" if torch.cuda.is_available() else "cpu"
    return device


def num_threads(device: torch.device) -> int:
    """Returns the number of threads of a pipeline: two per video decoder, because one thread decodes one sample."""
    if device.type == "cpu":
        return num_cores()
    words = torch.cuda.get_device_name(device).replace("-", " ").split()
    engines = next((NVDEC_ENGINES[word] for word in words if word in NVDEC_ENGINES), _OTHER_ENGINES)
    return _THREADS_AN_ENGINE * engines


def _decoded_by_worker(sample: int, share: float) -> bool:
    """Returns True if a worker decodes the video of a sample. Such samples are spread evenly over the batches."""
    return sample * _GOLDEN % 1 < share


def _distinct(clip: Clip, plan: ClipPlan) -> NDArray[np.int32]:
    """Returns the planned frame numbers, each once, ascending."""
    numbers_U = np.unique(plan.frames_T)
    if numbers_U[0] < 0 or numbers_U[-1] >= clip.num_frames:
        raise ValueError(f'clip "{clip.id}" has {clip.num_frames} frames, the plan needs {numbers_U.tolist()}')
    return numbers_U


def can_decode(kind: str, codec: str, width: int, height: int) -> bool:
    """Returns True if DALI on a device ("gpu" or "cpu") can decode video of a codec and size."""
    least = _LEAST[kind].get(codec)
    if least is None or width < least[0] or height < least[1]:
        return False
    # According to its source, DALI's colour conversion on a GPU writes blocks of 2 x 2 pixels, which would write beyond
    # the memory of a picture with an odd size.
    return kind == "cpu" or (width % 2 == 0 and height % 2 == 0)


def check_size(spliced: SplicedFrames, clip: Clip) -> None:
    """Checks the picture size in the stream, because the decoder allocates memory for the size in the manifest.

    Raises:
        MediaError: The sizes differ.
    """
    with media_errors(clip.source, "video"):
        if spliced.codec == "h264":
            context: Any = av.CodecContext.create("h264", "r")
            context.parse(spliced.units[0])
            context.parse(b"")
            size = context.width, context.height
        else:
            size = Image.open(io.BytesIO(spliced.units[0])).size
    if size != (clip.width, clip.height):
        expected = f"expected {clip.width}x{clip.height} as in the manifest"
        raise MediaError(clip.source, f'clip "{clip.id}" is {size[0]}x{size[1]}, {expected}', "video")


def _whole_file(clip: Clip, kind: str) -> bytes | None:
    """Returns the content of a media file if DALI certainly numbers and shows its frames as the manifest does.

    Otherwise returns None. Frame numbers are ranks of presentation times, as in `fastav.media.frame_seek`, and the same
    doubts apply.
    """
    path = clip.video
    if path is None or clip.start_frame or clip.rotation or clip.mirrored:
        return None
    with media_errors(path, "video"), open_media(path) as container:
        stream = first_stream(container, "video", path)
        if stream is None or container.format.name not in _CONTAINERS or len(container.streams.video) > 1:
            return None
        context = stream.codec_context
        fits = (
            can_decode(kind, context.codec.canonical_name, clip.width, clip.height)
            and (context.width, context.height) == (clip.width, clip.height)
            and context.pix_fmt in _PIXELS
            and int(context.colorspace) in _BT601
            and path.stat().st_size <= _LARGEST_FILE_BYTES
        )
        if not fits or not _frames_match([packet for packet in container.demux(stream) if packet.size], stream, clip):
            return None
        return Path(path).read_bytes()


def _frames_match(packets: list[Any], stream: Any, clip: Clip) -> bool:
    """Returns True if the packets of a file are its frames, and the clip consists of the first of them."""
    if not packets or any(packet.pts is None or packet.is_discard or packet.is_corrupt for packet in packets):
        return False
    pts_N = np.sort(np.array([packet.pts for packet in packets], dtype=np.int64))
    if not packets[0].is_keyframe or packets[0].pts != pts_N[0] or np.any(np.diff(pts_N) <= 0):
        return False
    times_N = frame_times_s(pts_N, int(pts_N[0]), stream.time_base)
    count, end_s = clip.num_frames, clip.start_s + clip.duration_s - TIME_TOLERANCE_S
    if count >= len(times_N):
        return count == len(times_N)
    return bool(times_N[count - 1] < end_s <= times_N[count])


def trial_video(codec: str) -> VideoSample:
    """Returns a test video: the first and the last of three GOPs of grey pictures.

    It is spliced like packed video. In H.264, both GOPs have the same `idr_pic_id`, as can happen in packs.
    """
    context: Any = av.CodecContext.create("libx264" if codec == "h264" else codec, "w")
    context.width = context.height = _TRIAL_SIDE
    context.pix_fmt = "yuv420p" if codec == "h264" else "yuvj420p"
    context.time_base, context.thread_count = Fraction(1, 25), 1
    if codec == "h264":
        parameters = f"keyint=2:min-keyint=2:scenecut=0:bframes=0:aud=1:repeat-headers=1:{SAME_BYTES}"
        context.options = {"x264-params": parameters}
    units: list[bytes] = []
    first, second = TRIAL_GREYS[:2], TRIAL_GREYS[2:]
    for number, grey in enumerate((*first, *first, *second)):
        grey_HWC = np.full((_TRIAL_SIDE, _TRIAL_SIDE, 3), grey, np.uint8)
        frame = av.VideoFrame.from_ndarray(grey_HWC, format="rgb24").reformat(format=context.pix_fmt)
        frame.pts = number
        units += [bytes(packet) for packet in context.encode(frame) if packet.size]
    units += [bytes(packet) for packet in context.encode(None) if packet.size]
    keys = [True, codec != "h264"] * 2
    data = mp4_muxer.mux(codec, [*units[:2], *units[4:]], keys, _TRIAL_SIDE, _TRIAL_SIDE)
    numbers = np.arange(len(keys), dtype=np.int32)
    return VideoSample(data, numbers, numbers, ((0, 0, _TRIAL_SIDE, _TRIAL_SIDE),), (False,), 3 * _TRIAL_SIDE**2)


def _wrong_pictures(results: GraphResults) -> str:
    """Returns the reason if the decoded test video has wrong pictures: DALI may return uninitialised memory."""
    shown = results.parts[0][1][0][0].float().mean((1, 2, 3)).tolist()
    if all(abs(level - grey) < _TRIAL_LEVELS for level, grey in zip(shown, TRIAL_GREYS, strict=True)):
        return ""
    levels = ", ".join(f"{level:.0f}" for level in shown)
    return f"frames with grey levels {', '.join(map(str, TRIAL_GREYS))} were decoded as {levels}"
