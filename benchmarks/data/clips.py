"""Media of the benchmark: a raw clip as the web delivers it, the same clip packed, and files for other readers."""

from __future__ import annotations

import io
import json
import wave
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
from numpy.typing import NDArray
from PIL import Image
from scipy.ndimage import gaussian_filter

from fastav.core.errors import UserError
from fastav.data.clip import Clip
from fastav.data.manifest import write_manifest
from fastav.media.audio import mix_down, resample
from fastav.media.probe import probe
from fastav.media.shards import ShardReader, ShardReading
from fastav.pack.build import build_pack
from fastav.pack.settings import PackSettings

WIDTH, HEIGHT, FPS = 640, 360, 25
_GRAIN, _SHARPEN = 3.7, 1.2  # about 1 Mbit/s at crf 23, as a web clip has
_DUMPED = 10  # JPEGs a clip
PACKS = {
    "small": PackSettings(preset="small"),
    "balanced": PackSettings(),
    "fast": PackSettings(preset="fast"),
    "mjpeg": PackSettings(codec="mjpeg"),
}


@dataclass(frozen=True)
class TestFiles:
    """One clip in all forms.

    Attributes:
        raw: Manifest row of the raw clip.
        packed: Name of the pack -> manifest row of the packed clip.
        remuxed: Name of the pack -> mp4 file with the same access units, for readers of files.
        quality: Name of the pack -> luma PSNR relative to the scaled raw clip, dB.
        dump: Folder with ten JPEGs and a WAV.
        footage: Description of the source video.
    """

    raw: Clip
    packed: dict[str, Clip]
    remuxed: dict[str, Path]
    quality: dict[str, float]
    dump: Path
    footage: str


def make(
    folder: Path, footage: Path | None, *, frames: int = 250, size: tuple[int, int] = (WIDTH, HEIGHT)
) -> TestFiles:
    """Writes all files; files that already exist in the folder are used again.

    Args:
        folder: Folder to write to.
        footage: Real video as the source; None: a generated scene.
        frames: Number of frames.
        size: Width and height, pixels.

    Raises:
        UserError: The footage is too short.
    """
    folder.mkdir(parents=True, exist_ok=True)
    raw_path = folder / "raw.mp4"
    if not raw_path.exists():
        _write_raw(raw_path, scene(footage, frames, size), size)
    info = probe(raw_path)
    span = info.cut()
    raw = Clip(
        id="raw", video=raw_path.absolute(), audio=raw_path.absolute(), duration_s=info.duration_s,
        num_frames=info.num_frames, fps=info.fps, width=info.width, height=info.height, video_codec="h264",
        start_sample=span.start_sample, num_samples=span.num_samples, sample_rate=info.sample_rate,
        channels=info.channels, audio_codec=info.audio_codec, audio_offset_s=info.audio_offset_s, labels=("a",),
    )  # fmt: skip
    manifest = write_manifest(folder / "raw.parquet", [raw])
    packed, remuxed, quality = {}, {}, {}
    for name, settings in PACKS.items():
        clip = build_pack(manifest, folder / name, settings, workers=1).clip(0)
        packed[name] = clip
        remuxed[name] = folder / f"{name}.mp4"
        _remux(clip, remuxed[name])
        quality[name] = _psnr(folder / name)
    _dump(raw, folder / "dump")
    kind = f"{footage.name}, upscaled, sharpened, with grain" if footage else "procedural scene with grain"
    return TestFiles(raw, packed, remuxed, quality, folder / "dump", kind)


def scene(footage: Path | None, frames: int, size: tuple[int, int]) -> list[NDArray[np.uint8]]:
    """Returns planar 4:2:0 frames with added grain, of real footage or of generated moving textures."""
    width, height = size
    rng = np.random.default_rng(0)
    if footage is None:
        pictures = [_drawn(i, width, height) for i in range(frames)]
    else:
        pictures = []
        with av.open(str(footage)) as container:
            for frame in container.decode(video=0):
                if len(pictures) == frames:
                    break
                pictures.append(frame.reformat(width, height, "yuv420p", interpolation="LANCZOS").to_ndarray())
        if len(pictures) < frames:
            raise UserError(f"{footage}: has {len(pictures)} frames, expected at least {frames}")
    grainy_frames = []
    for picture in pictures:
        luma = picture[:height].astype(np.float32)
        luma += _SHARPEN * (luma - gaussian_filter(luma, 1.2)) + rng.normal(0, _GRAIN, luma.shape)
        grainy = picture.copy()
        grainy[:height] = np.clip(luma, 16, 235).astype(np.uint8)
        grainy_frames.append(grainy)
    return grainy_frames


def _drawn(number: int, width: int, height: int) -> NDArray[np.uint8]:
    """Draws a panning texture with two discs that move across it."""
    y, x = np.mgrid[:height, :width].astype(np.float32)
    shift = number * 1.3
    luma = 110 + 35 * np.sin((x + shift) / 23) * np.cos(y / 31) + 25 * np.sin((x * 0.6 + y + shift) / 9)
    for k, (speed, radius) in enumerate(((2.1, 50), (-1.4, 34))):
        cx, cy = (width * (0.3 + 0.4 * k) + speed * number) % width, height * (0.4 + 0.2 * k)
        inside = (x - cx) ** 2 + (y - cy) ** 2 < radius**2
        luma[inside] = 190 - 80 * k + 20 * np.sin((x[inside] - cx) / 5)
    planar = np.full((height * 3 // 2, width), 128, np.uint8)
    planar[:height] = luma.clip(16, 235)
    return planar


def _write_raw(path: Path, pictures: list[NDArray[np.uint8]], size: tuple[int, int]) -> None:
    """Encodes H.264 (medium, one keyframe, three B-frames, crf 23) and 44.1 kHz stereo AAC."""
    partial = path.with_suffix(".part.mp4")
    seconds = len(pictures) / FPS
    with av.open(str(partial), "w") as container:
        options = {"preset": "medium", "crf": "23", "g": "250", "bf": "3", "keyint_min": "250", "sc_threshold": "0"}
        video: Any = container.add_stream("libx264", rate=FPS, options=options)
        video.width, video.height, video.pix_fmt = *size, "yuv420p"
        sound: Any = container.add_stream("aac", rate=44_100)
        sound.layout = "stereo"
        for i, picture in enumerate(pictures):
            frame = av.VideoFrame.from_ndarray(picture, "yuv420p")
            frame.pts = i
            container.mux(video.encode(frame))
        container.mux(video.encode(None))
        time_S = np.arange(round(seconds * 44_100)) / 44_100
        tone_S = 0.3 * np.sin(2 * np.pi * (400 + 900 * time_S) * time_S) + np.random.default_rng(1).normal(
            0, 0.05, len(time_S)
        )
        for begin in range(0, len(tone_S), 1024):
            piece = np.repeat(tone_S[None, begin : begin + 1024], 2, axis=0).astype(np.float32)
            samples = av.AudioFrame.from_ndarray(np.ascontiguousarray(piece), "fltp", "stereo")
            samples.sample_rate, samples.pts, samples.time_base = 44_100, begin, Fraction(1, 44_100)
            container.mux(sound.encode(samples))
        container.mux(sound.encode(None))
    partial.replace(path)


def _remux(clip: Clip, path: Path) -> None:
    """Writes a packed clip's access units to an mp4 file, unchanged."""
    frames = ShardReader(ShardReading()).fetch(clip, list(range(clip.num_frames)), None).frames
    assert frames is not None, "the clip has video"
    with av.open(io.BytesIO(frames.stream), format=frames.codec) as source, av.open(str(path), "w") as out:
        stream = out.add_stream_from_template(source.streams.video[0])
        for i, (unit, key) in enumerate(zip(frames.units, frames.keys, strict=True)):
            packet = av.Packet(unit)
            packet.stream, packet.time_base = stream, Fraction(1, FPS * 512)
            packet.pts = packet.dts = i * 512
            packet.duration, packet.is_keyframe = 512, key
            out.mux(packet)


def _dump(clip: Clip, folder: Path) -> None:
    """Extracts ten evenly spaced frames as JPEGs and the audio as WAV, as is common practice."""
    folder.mkdir(exist_ok=True)
    wanted = {(2 * i + 1) * clip.num_frames // (2 * _DUMPED): i for i in range(_DUMPED)}
    sound = []
    with av.open(str(clip.video)) as container:
        for i, frame in enumerate(container.decode(video=0)):
            if i in wanted:
                scaled = frame.reformat(448, 256, "rgb24", interpolation="BICUBIC").to_ndarray()
                Image.fromarray(scaled).save(folder / f"{wanted[i]}.jpg", quality=90)
    with av.open(str(clip.audio)) as container:
        sound = [mix_down(frame) for frame in container.decode(audio=0)]
    mono_S = resample(np.concatenate(sound), clip.sample_rate, 16_000)
    with wave.open(str(folder / "sound.wav"), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(16_000)
        file.writeframes((mono_S.clip(-1, 1) * 32_767).astype("<i2").tobytes())


def _psnr(pack: Path) -> float:
    return float(json.loads((pack / "pack.json").read_text())["quality"]["psnr_y_db"])


def repeated(clip: Clip, count: int, path: Path) -> Any:
    """Writes a manifest that contains one clip `count` times."""
    return write_manifest(path, [replace(clip, id=f"{clip.id}-{i:05d}") for i in range(count)])
