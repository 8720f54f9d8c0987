"""The decoder for NVIDIA GPUs: DALI decodes whole batches, and crops, resizes and computes spectrograms where they are.

`prepare` reads what one clip needs (bytes and small arrays); any number of threads may call it. `decode` turns a batch
of that into tensors on the device; several threads may call it, too: each call takes one of `pipelines` pairs of
pipelines (frames, sound), or waits for one. It blocks its thread, not Python's lock. So a loader drives it with as many
threads as there are pipelines, each taking whole batches whose clips are prepared; batches may finish out of order. A
batch is complete when `decode` returns. The consumer calls `DecodedBatch.adopt` on the CUDA stream that it computes on.

What goes through DALI, and what does not:

* Packed video, spliced: its access units in an MP4 made here (`fastav.media.mp4_muxer` says why). DALI opens bare
  streams of MJPEG and H.264 in Annex B as well, but parses them several times.
* A media file whose span starts with the file, if DALI numbers its frames as the manifest does (every packet one frame
  with a timestamp of its own) and shows them as PyAV does (upright, 8-bit 4:2:0, BT.601, which DALI takes everything
  for). It decodes from the file's start up to the last planned frame: packing is what makes this fast.
* Everything else that is to be seen is decoded by PyAV in `prepare`: pieces of files, pictures, turned or BT.709 video,
  codecs and sizes that the device cannot take. DALI on a CPU has no H.264, on a GPU no MJPEG: such packs are decoded by
  PyAV there. So is the share `hybrid` of all.
* Sound of packs: the FLAC frames that the windows look at, behind a header that says how many samples follow. (With the
  clip's own header libsndfile refuses a stream that ends early; with this one it gives the very samples.) Other sound
  (another rate, AAC, more than two channels) is decoded and resampled by PyAV and handed over as a WAV of float32.
* Stored spectrograms are cut in `prepare`.

Against PyAV with `augment.resize_crop`, frames differ by less than 2 levels in the mean: colour and chroma are rounded
otherwise (MJPEG 1.4, VP9 1.7 levels before resizing), resizing adds 0.2 to 0.5. Spectrograms differ by less than 2e-3
dB (`fastav.media.dali.graph`).

A clip that DALI cannot decode fails its batch. That is then run clip by clip in fresh pipelines: the failing clips are
reported, the others come out as in a batch without them. If all fail, a made stream tells whether it was the clips or
DALI, such as a GPU out of memory. Packed bytes were checked against their CRC before. What FFmpeg's decoders conceal,
as a cut-off JPEG in a raw file, DALI does not report either.

Not measured, for want of a GPU: all of device "gpu". It is the same graph with the decoder "mixed" and what follows on
the GPU; the reasons for its settings come from DALI's source and issues. To be looked at first: NVDEC on spliced groups
(x264's `idr_pic_id` may repeat at a seam; packs have access unit delimiters there), and clips per second for 1, 2, 3
pipelines and different numbers of threads. By its source, DALI finds NVDEC sessions again only for sides that are
multiples of 16, which packs have; and where NVDEC gives fewer frames than the header tells, the missing ones stay
unwritten memory without an error, so pictures must be compared, not only failures counted.
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
from fastav.media.dali.audio import AudioSpan, shortened, wav_of
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
"""Video decoders of a GPU by a word of its name."""

_OTHER_ENGINES = 2
_THREADS_AN_ENGINE = 2
_GOLDEN = (5**0.5 - 1) / 2

_LEAST: dict[str, dict[str, tuple[int, int]]] = {
    # Sides that NVDEC takes at least. AV1 is left out: of the GPUs above only the L4 has it. So is MJPEG: DALI 2.4
    # documents it for the GPU, but its library refuses it.
    "gpu": {"h264": (48, 16), "hevc": (144, 144), "vp8": (48, 16), "vp9": (128, 128)},
    "cpu": {"mjpeg": (16, 16), "vp8": (16, 16), "vp9": (16, 16)},
}
_CONTAINERS = frozenset({"mov,mp4,m4a,3gp,3g2,mj2", "matroska,webm"})
_PIXELS = frozenset({"yuv420p", "yuvj420p"})
_BT601 = frozenset({2, 5, 6})  # FFmpeg's numbers; 2 is unspecified
_LARGEST_FILE_BYTES = 1 << 26
_TRIAL_SIDE, _TRIAL_LEVELS = 128, 8
TRIAL_GREYS = (40, 90, 140, 190)
"""Of the pictures of the clip on which DALI is tried."""


class Dali(Kind, frozen=True, tag="dali"):
    """NVIDIA DALI.

    Attributes:
        device: `gpu` for NVDEC and CUDA, `cpu` for the same graph without; `auto` takes the GPU where there is one.
        threads: Of one pipeline; 0 for two a video decoder of the GPU (`NVDEC_ENGINES`), on a CPU one a core.
        pipelines: Batches that are decoded at the same time.
        hybrid: Share of the clips whose video the loader's workers decode with PyAV, to relieve the GPU; which clips
            depends on the number of the sample alone.
    """

    device: Device = "auto"
    threads: NonNegativeInt = 0
    pipelines: PositiveInt = 2
    hybrid: Share = 0.0

    def build(self, spec: DecodeSpec) -> DaliDecoder:
        """Returns the decoder for a run, on the current CUDA device.

        Raises:
            UserError: Something is missing, or the frontend's settings contradict one another.
            FastavError: DALI is there and does not work.
        """
        return DaliDecoder(self, spec)


def missing_requirement(device: Device) -> str:
    """Returns what DALI lacks to work here, one line; empty where it lacks nothing. Loads nothing of DALI."""
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
        return f"the driver's video decoder libnvcuvid.so.1 is not there (a container needs {needed})"
    return ""


@functools.cache
def self_test_failure(device: Device) -> str:
    """Returns why DALI does not show the pictures of a made, spliced stream here; empty where it does. Tried once."""
    place = PipelinePlace(None if device_kind(device) == "cpu" else torch.cuda.current_device(), 2)
    slot = Slot(place, DecodeSpec(("video",), _TRIAL_SIDE))
    with slot.current():
        return slot.trial(device_kind(device))


class DaliDecoder:
    """Decodes batches; the top of this file says which threads may call what.

    Args:
        config: Its settings.
        read: What the run reads.
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
        spec.frontend.build()  # says where its settings contradict one another
        self.device = torch.device("cpu") if self.kind == "cpu" else torch.device("cuda", torch.cuda.current_device())
        self.threads = config.threads or num_threads(self.device)
        self._shards = ShardReader(spec.reading)
        # What DALI does not take; each sees one modality, so that nothing is decoded twice.
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
            why = slot.trial(self.kind)
        if why:
            raise FastavError(f'decode.kind "dali" with device "{config.device}" does not work here: {why}')

    @property
    def batches_at_once(self) -> int:
        """Batches that `decode` works on at the same time."""
        return self.config.pipelines

    def prepare(self, clip: Clip, plans: Sequence[ClipPlan]) -> PreparedClip:
        """Reads what decoding a clip needs; may be called from any number of threads.

        Args:
            clip: A probed row of a manifest.
            plans: The replicas of one clip: same frames and windows, their own crop and flip.

        Raises:
            MediaError: The file is not what the row promises; names file and stage.
        """
        seen, heard = ("video" in self.spec.modalities and clip.has_video), "audio" in self.spec.modalities
        sounds = heard and clip.num_samples > 0 and clip.mel is None
        starts_W = plans[0].windows_W
        cut = self._cut(clip, starts_W) if sounds else None
        numbers_U = _distinct(clip, plans[0]) if seen else None
        wanted_U = None if _is_workers(plans[0].sample, self.config.hybrid) else numbers_U
        packed = self._fetch(clip, wanted_U, cut) if clip.shard else FetchedClip()
        film = None if wanted_U is None else self._film(clip, plans, wanted_U, packed.frames)
        pictures = wave = mel_WCML = None
        if seen and film is None:
            samples = self._video_fallback.decode(clip, plans)
            pictures = tuple(sample.frames_TCHW for sample in samples if sample.frames_TCHW is not None)
        if sounds and cut is None:  # no window holds any of it
            shape = len(starts_W), 1, self.spec.frontend.num_mels, self.spec.window
            mel_WCML = torch.full(shape, self.spec.frontend.floor_db)
        elif cut is not None:
            wave = self._wave(clip, cut, starts_W, packed.audio)
        elif heard and clip.num_mel_frames:
            mel_WCML = self._audio_fallback.decode(clip, plans[:1])[0].mel_WCML
        if film is None and pictures is None and wave is None and mel_WCML is None:
            raise MediaError(clip.source, "holds nothing of what the run looks at")
        return PreparedClip(clip, tuple(plans), film, pictures, wave, mel_WCML)

    def decode(
        self,
        prepared: Sequence[PreparedClip | None],
        rows: Sequence[Sequence[int]],
        *,
        size: int,
        frames: int,
        windows: int,
    ) -> DecodedBatch:
        """Makes a batch; may be called from several threads, of which `pipelines` work at a time.

        Args:
            prepared: Clips; None for one that could not be prepared.
            rows: Which row of the batch each plan of each clip goes to; rows that are not named stay blank.
            size: Rows of the batch.
            frames: Frames of a clip.
            windows: Windows of a clip.

        Raises:
            FastavError: DALI does not work any more, whatever the clips.
        """
        with self._slot() as slot:
            made = DeviceBatch(self.spec, self.device, prepared, rows, size, frames, windows)
            slot.films.start([clip.film for clip in made.clips if clip.film is not None])
            slot.waves.start([clip.wave for clip in made.clips if clip.wave is not None])
            made.take_finished()  # while DALI works
            seen, heard = slot.films.finish(), slot.waves.finish()
            if any(len(results.failed) > 1 and not results.parts for results in (seen, heard)):
                why = slot.trial(self.kind)
                if why:
                    raise FastavError(f"DALI stopped working: {why}")
            made.take_films(seen)
            made.take_waves(heard)
            made.try_again(self._full_fallback.decode)
            return made.finish()

    def close(self) -> None:
        """Frees the pipelines; waits for batches that are being decoded."""
        slots = [self._slots.get() for _ in range(self.config.pipelines)]
        for slot in slots:
            slot.films.close()
            slot.waves.close()
            self._slots.put(slot)

    @contextmanager
    def _slot(self) -> Iterator[Slot]:
        """Lends one of the pairs of pipelines, with its CUDA stream as the current one."""
        slot = self._slots.get()
        try:
            with slot.current():
                yield slot
        finally:
            self._slots.put(slot)

    def _cut(self, clip: Clip, starts_W: NDArray[np.int32]) -> AudioSpan | None:
        """What the windows look at, in samples of the spectrogram's rate."""
        frontend = self.spec.frontend
        count = round(clip.num_samples * frontend.sample_rate / clip.sample_rate)
        return AudioSpan.of(frontend, starts_W, self.spec.window, count)

    def _is_direct(self, clip: Clip) -> bool:
        """Whether DALI decodes a packed clip's sound to what PyAV makes of it."""
        frontend = self.spec.frontend
        same = clip.sample_rate == frontend.sample_rate and clip.channels <= 2  # their mean is both's downmix
        return same and clip.num_samples > frontend.n_fft // 2

    def _fetch(self, clip: Clip, numbers_U: NDArray[np.int32] | None, cut: AudioSpan | None) -> FetchedClip:
        """Reads of a packed clip what DALI or `_wave` decodes."""
        fits = clip.video_codec in mp4_muxer.FOURCC and can_decode(self.kind, clip.video_codec, clip.width, clip.height)
        numbers = numbers_U.tolist() if numbers_U is not None and fits else None
        samples = None
        if cut is not None:
            samples = (cut.begin, cut.end) if self._is_direct(clip) else (0, clip.num_samples)
        return FetchedClip() if numbers is None and samples is None else self._shards.fetch(clip, numbers, samples)

    def _film(
        self, clip: Clip, plans: Sequence[ClipPlan], numbers_U: NDArray[np.int32], spliced: SplicedFrames | None
    ) -> VideoSample | None:
        """A clip's video for DALI; None where PyAV must decode it."""
        if spliced is not None:
            check_size(spliced, clip)
            data = mp4_muxer.mux(spliced.codec, spliced.units, spliced.keys, clip.width, clip.height)
            frames_U = np.array(spliced.shown, np.int32)
        else:
            whole = _plain(clip, self.kind)
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

    def _wave(self, clip: Clip, cut: AudioSpan, starts_W: NDArray[np.int32], sound: SplicedAudio | None) -> AudioSample:
        """A clip's sound for DALI: as it is packed, or decoded and resampled here."""
        if sound is not None and self._is_direct(clip):
            begin, count = cut.begin - sound.start, cut.end - cut.begin
            return AudioSample(shortened(sound, clip), begin, count, cut.first, cut.total, starts_W)
        frontend = self.spec.frontend
        with media_errors(clip.source, "audio"):
            if sound is not None:
                wave_CS = decode_waveform(sound, clip, frontend.sample_rate)
            else:
                heard = read_media(clip, None, True)
                assert heard is not None, "sound was asked for"
                wave_CS = heard.waveform(frontend.sample_rate)
        wave_S = wave_CS[0].numpy()
        wave_S = np.pad(wave_S, (0, max(frontend.n_fft // 2 + 1 - len(wave_S), 0)))[cut.begin : cut.end]
        return AudioSample(wav_of(wave_S, frontend.sample_rate), 0, len(wave_S), cut.first, cut.total, starts_W)


class Slot:
    """A pair of pipelines, and the CUDA stream on which their batches are put together."""

    def __init__(self, place: PipelinePlace, spec: DecodeSpec) -> None:
        self.place, self.spec = place, spec
        self.films: Engine[VideoSample] = Engine(VideoGraph(place, spec.image_size))
        self.waves: Engine[AudioSample] = Engine(AudioGraph(place, spec.frontend))
        self._stream = None if place.device_id is None else torch.cuda.Stream(place.device_id)

    @contextmanager
    def current(self) -> Iterator[None]:
        """Makes its device and stream the calling thread's."""
        if self._stream is None:
            yield
            return
        with torch.cuda.device(self.place.device_id), torch.cuda.stream(self._stream):
            yield

    def trial(self, kind: str) -> str:
        """Decodes a made clip in pipelines of its own; returns why that does not work, or nothing."""
        frontend = self.spec.frontend
        samples = np.zeros(4 * frontend.n_fft, np.float32)
        starts_W = np.zeros(1, np.int32)
        wave = AudioSample(wav_of(samples, frontend.sample_rate), 0, len(samples), 0, 1, starts_W)
        trials: list[tuple[Graph[Any], Any]] = []
        if "audio" in self.spec.modalities:
            trials.append((AudioGraph(self.place, frontend), wave))
        if "video" in self.spec.modalities:
            trials.append(
                (VideoGraph(self.place, self.spec.image_size), made_film("h264" if kind == "gpu" else "mjpeg"))
            )
        for graph, sample in trials:
            engine: Engine[Any] = Engine(graph)
            try:
                engine.start([sample])
                results = engine.finish()
            except ImportError as error:
                return f"nvidia.dali cannot be loaded ({error})"
            if results.failed:
                return results.failed[0]
            if isinstance(sample, VideoSample) and (wrong := _seen_wrong(results)):
                return wrong
        return ""


def device_kind(device: Device) -> Literal["gpu", "cpu"]:
    """Returns what a device setting stands for here."""
    if device == "auto":
        return "gpu" if torch.cuda.is_available() else "cpu"
    return device


def num_threads(device: torch.device) -> int:
    """Threads of a pipeline: two for each video decoder, as one sample is decoded by one thread."""
    if device.type == "cpu":
        return num_cores()
    words = torch.cuda.get_device_name(device).replace("-", " ").split()
    engines = next((NVDEC_ENGINES[word] for word in words if word in NVDEC_ENGINES), _OTHER_ENGINES)
    return _THREADS_AN_ENGINE * engines


def _is_workers(sample: int, share: float) -> bool:
    """Whether a sample's video is the workers' part; consecutive samples are spread evenly, so batches share alike."""
    return sample * _GOLDEN % 1 < share


def _distinct(clip: Clip, plan: ClipPlan) -> NDArray[np.int32]:
    """The planned frames, each once, ascending."""
    numbers_U = np.unique(plan.frames_T)
    if numbers_U[0] < 0 or numbers_U[-1] >= clip.num_frames:
        raise ValueError(f"frames {numbers_U.tolist()} planned of {clip.num_frames} of clip {clip.id}")
    return numbers_U


def can_decode(kind: str, codec: str, width: int, height: int) -> bool:
    """Whether DALI decodes such video there."""
    least = _LEAST[kind].get(codec)
    if least is None or width < least[0] or height < least[1]:
        return False
    # DALI's colour conversion on a GPU writes squares of 2 x 2 pixels, beyond an odd picture's room (by its source).
    return kind == "cpu" or (width % 2 == 0 and height % 2 == 0)


def check_size(spliced: SplicedFrames, clip: Clip) -> None:
    """Looks at the size that the stream itself tells: the decoder writes into room for that of the row.

    Raises:
        MediaError: They differ.
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
        found = f"{size[0]}x{size[1]}, its row says {clip.width}x{clip.height}"
        raise MediaError(clip.source, f'clip "{clip.id}" is {found}', "video")


def _plain(clip: Clip, kind: str) -> bytes | None:
    """Returns a media file whole, if DALI is certain to number and show its frames as the manifest does.

    Frame numbers are ranks of presentation times, as in `fastav.media.frame_seek`; what is in doubt there is so here.
    """
    path = clip.video
    if path is None or clip.start_frame or clip.rotation:
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
        if not fits or not _is_plain([packet for packet in container.demux(stream) if packet.size], stream, clip):
            return None
        return Path(path).read_bytes()


def _is_plain(packets: list[Any], stream: Any, clip: Clip) -> bool:
    """Whether a file's packets are its frames, and the first of them the clip's."""
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


def made_film(codec: str) -> VideoSample:
    """Two groups of grey pictures out of three, spliced: what packs give, with x264's `idr_pic_id` twice the same."""
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


def _seen_wrong(results: GraphResults) -> str:
    """Says whether the made film came out as other pictures than went in: unwritten memory is no failure for DALI."""
    shown = results.parts[0][1][0][0].float().mean((1, 2, 3)).tolist()
    if all(abs(level - grey) < _TRIAL_LEVELS for level, grey in zip(shown, TRIAL_GREYS, strict=True)):
        return ""
    levels = ", ".join(f"{level:.0f}" for level in shown)
    return f"spliced groups of grey {', '.join(map(str, TRIAL_GREYS))} come out as {levels}"
