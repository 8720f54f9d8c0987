"""Draws and encodes the streams of the made data set: a bird with a plumage pattern, and its call.

Everything here is a pure function of its arguments; a random generator is always passed in. Only numpy and
PyAV are needed, so that a worker process starts quickly.

What the eye can tell apart is the plumage alone (`PATTERNS`), what the ear can tell apart is the call alone
(`CALLS`). All else varies freely within each of them: place, size, motion, hue, landscape, pitch, tempo,
level, noise.
"""

from __future__ import annotations

import colorsys
import io
import math
import signal
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Literal, NamedTuple

import av
import numpy as np
from numpy.typing import NDArray

from fastav.media.x264 import SAME_BYTES

PATTERNS = ("barred", "streaked", "spotted", "ringed")
CALLS = ("whistler", "weeper", "warbler", "rattler")

FPS = 25
DURATION_S = 4.0
NUM_FRAMES = 100
GOP = 250
SAMPLE_RATE = 44_100
NUM_SAMPLES = 176_400
NUM_POSES = 5  # tilts in which a bird is drawn; after that it is only moved

Floats = NDArray[np.float32]
Rng = np.random.Generator
Damage = Literal["", "blank", "torn", "cut", "empty"]


class StreamSpec(NamedTuple):
    """One stream to draw.

    Attributes:
        content: Number in `PATTERNS` of a video, in `CALLS` of an audio stream.
        recorder: Key of the generator that draws its `Recorder`.
        key: Key of the generator that draws everything else.
    """

    content: int
    recorder: tuple[int, ...]
    key: tuple[int, ...]


class OutputFile(NamedTuple):
    """One mp4 file: which of its job's streams it holds (`audio` None: no sound), and how it is broken."""

    path: str
    video: int
    audio: int | None
    damage: Damage = ""


class RenderJob(NamedTuple):
    """Streams that are drawn and encoded once, and the files they are put into; a worker's unit of work."""

    videos: tuple[StreamSpec, ...]
    audios: tuple[StreamSpec, ...]
    outputs: tuple[OutputFile, ...]
    size: tuple[int, int]


@dataclass(frozen=True, slots=True)
class Recorder:
    """One recording device at one place: what its clips share besides their classes.

    Attributes:
        sky: RGB at the top of the picture and at the horizon, 0-255, each of 3.
        ground: RGB of the hills, 0-255.
        exposure: Factor on the picture's brightness.
        grain: Standard deviation of the sensor noise, grey levels.
        noise_slope: Power of the frequency by which the noise amplitude falls: 0 white, 1 brown.
        noise_db: Level of the noise against the call, dB.
        gain_db: Level of the whole track, dB.
        balance: Share of the left channel's gain that the right one lacks, -1 to 1.
    """

    sky: tuple[Floats, Floats]
    ground: Floats
    exposure: float
    grain: float
    noise_slope: float
    noise_db: float
    gain_db: float
    balance: float

    @classmethod
    def draw(cls, rng: Rng) -> Recorder:
        """Returns a random recorder."""
        hue = rng.uniform()
        return cls(
            sky=(
                _rgb(hue, rng.uniform(0.25, 0.6), rng.uniform(0.55, 0.9)),
                _rgb(hue + rng.uniform(-0.15, 0.15), rng.uniform(0.1, 0.4), rng.uniform(0.6, 0.95)),
            ),
            ground=_rgb(rng.uniform(), rng.uniform(0.2, 0.6), rng.uniform(0.25, 0.6)),
            exposure=rng.uniform(0.85, 1.0),
            grain=rng.uniform(0.5, 2.5),
            noise_slope=rng.uniform(0.0, 1.0),
            noise_db=rng.uniform(-22.0, -12.0),
            gain_db=rng.uniform(-12.0, 0.0),
            balance=rng.uniform(-0.5, 0.5),
        )


def _colour(red: float, green: float, blue: float) -> Floats:
    return np.array((red, green, blue), np.float32)


def _rgb(hue: float, saturation: float, value: float) -> Floats:
    """Returns RGB of 0 to 255; the hue wraps at 1."""
    return _colour(*(255.0 * c for c in colorsys.hsv_to_rgb(hue % 1.0, saturation, value)))


def _sign(rng: Rng) -> float:
    """Returns -1 or 1."""
    return 2.0 * float(rng.integers(2)) - 1.0


def _edge(distance: Floats, width: float) -> Floats:
    """Returns 1 inside (negative distance), 0 outside, a ramp of `width` between."""
    return np.clip(0.5 - distance / width, 0.0, 1.0)


def _ellipse(x: Floats, y: Floats, centre: tuple[float, float], radii: tuple[float, float]) -> Floats:
    """Returns roughly the signed distance to an axis-parallel ellipse."""
    scaled = np.sqrt(((x - centre[0]) / radii[0]) ** 2 + ((y - centre[1]) / radii[1]) ** 2)
    return np.asarray((scaled - 1.0) * min(radii), np.float32)


def _wedge(x: Floats, y: Floats, root: tuple[float, float], tip: tuple[float, float], half: float) -> Floats:
    """Returns roughly the signed distance to a triangle with its base (2 * `half` wide) at `root`."""
    dx, dy = tip[0] - root[0], tip[1] - root[1]
    length = float(np.hypot(dx, dy))
    along = ((x - root[0]) * dx + (y - root[1]) * dy) / length
    across = np.abs((y - root[1]) * dx - (x - root[0]) * dy) / length
    return np.maximum(across - half * (1.0 - along / length), -along)


def _plumage(pattern: int, x: Floats, y: Floats, period: float, rng: Rng) -> Floats:
    """Returns the texture, 0 (dark) to 1 (light), at body coordinates.

    Args:
        pattern: Number in `PATTERNS`.
        x: Body coordinates, rightwards.
        y: Body coordinates, downwards.
        period: Of the texture, in the same unit.
        rng: Draws phase and polarity, so that no place of the body is bright in one pattern only.
    """
    a, b = rng.uniform(0.0, 2 * np.pi, 2)
    polarity = _sign(rng)
    k = 2 * np.pi / period
    if PATTERNS[pattern] == "barred":
        wave = np.sin(k * y + a)
    elif PATTERNS[pattern] == "streaked":
        wave = np.sin(k * x + a)
    elif PATTERNS[pattern] == "spotted":
        wave = 0.8 * (np.cos(k * x + a) + np.cos(k * y + b)) - 0.35
    else:
        wave = np.sin(k * np.hypot(x, y) + a)
    return np.clip(0.5 + 1.2 * polarity * wave, 0.0, 1.0)


def _poses(pattern: int, radius: float, side: int, rng: Rng) -> tuple[Floats, Floats]:
    """Draws one bird in `NUM_POSES` poses of a nodding cycle.

    Args:
        pattern: Number in `PATTERNS`.
        radius: Half the body's length, pixels.
        side: Of the picture's shorter side, pixels; the texture's period follows it.
        rng: Draws hue, tilt, facing and the texture's details.

    Returns:
        colour [P, h, w, 3] of 0-255 and opacity [P, h, w, 1] of 0-1, h = w an odd number of pixels.
    """
    half = int(1.6 * radius) + 1
    pixel = np.arange(-half, half + 1, dtype=np.float32) / radius
    facing = _sign(rng)
    tilt = rng.uniform(-0.14, 0.14) + np.linspace(-0.07, 0.07, NUM_POSES)
    cos, sin = (f(tilt).astype(np.float32)[:, None, None] for f in (np.cos, np.sin))
    grid_y, grid_x = pixel[None, :, None], facing * pixel[None, None, :]
    x, y = cos * grid_x + sin * grid_y, cos * grid_y - sin * grid_x
    soft = 1.0 / radius

    hue, light, dark = rng.uniform(), rng.uniform(0.0, 0.22), rng.uniform(0.06, 0.14)
    bright, deep = _rgb(hue, light, 1.0), _rgb(hue + rng.uniform(-0.1, 0.1), 0.6, dark)
    plain = _rgb(hue, rng.uniform(0.2, 0.6), rng.uniform(0.35, 0.7))
    period = side / 8 * rng.uniform(0.85, 1.15) / radius
    body = _edge(_ellipse(x, y, (0.0, 0.0), (1.0, 0.82)), soft)
    texture = _plumage(pattern, x, y, period, rng)[..., None]
    layers = [
        (_edge(_wedge(x, y, (-0.7, 0.1), (-1.55, -0.15), 0.3), soft), 0.7 * plain),  # tail
        (_edge(_wedge(x, y, (-0.15, 0.6), (-0.1, 1.7), 0.09), soft), deep),  # legs
        (_edge(_wedge(x, y, (0.2, 0.6), (0.25, 1.7), 0.09), soft), deep),
        (body, deep + texture * (bright - deep)),
        (_edge(_wedge(x, y, (0.95, -0.85), (1.5, -0.75), 0.14), soft), _colour(235, 160, 40)),  # beak
        (_edge(_ellipse(x, y, (0.72, -0.85), (0.36, 0.34)), soft), plain),  # head
        (_edge(_ellipse(x, y, (0.82, -0.92), (0.11, 0.11)), soft), _colour(250, 250, 245)),  # eye
        (_edge(_ellipse(x, y, (0.84, -0.92), (0.055, 0.055)), soft), _colour(10, 10, 10)),
    ]
    colour = np.zeros((*x.shape, 3), np.float32)
    opacity = np.zeros((*x.shape, 1), np.float32)
    for mask, paint in layers:
        cover = mask[..., None]
        colour += cover * (paint - colour)  # premultiplied by the opacity so far
        opacity += cover * (1.0 - opacity)
    return colour, opacity


def _landscape(recorder: Recorder, width: int, height: int, rng: Rng) -> Floats:
    """Returns a still background [height, width, 3], 0-255: a sky, two rows of hills, soft light."""
    x = np.arange(width, dtype=np.float32) / height
    y = np.arange(height, dtype=np.float32)[:, None] / height
    top, horizon = recorder.sky
    picture = top + (horizon - top) * np.broadcast_to(y, (height, width))[..., None]
    for distance in (0.35, 0.0):  # the far row is paler
        waves = rng.uniform(0.02, 0.09, 3) * np.sin(
            2 * np.pi * (x[:, None] * rng.uniform(0.3, 1.6, 3) + rng.uniform(0.0, 1.0, 3))
        )
        ridge = rng.uniform(0.45, 0.7) + (0.12 if distance == 0 else -0.06) + waves.sum(1)
        shade = recorder.ground * rng.uniform(0.7, 1.2)
        cover = _edge((ridge[None, :] - y).astype(np.float32), 1.5 / height)[..., None]
        picture = picture + cover * (shade + distance * (horizon - shade) - picture)
    light = 1.0 + 0.12 * np.sin(2 * np.pi * (x * rng.uniform(-1, 1) + y * rng.uniform(-1, 1) + rng.uniform()))
    return (picture * light[..., None]).astype(np.float32)


def draw_frames(pattern: int, recorder: Recorder, size: tuple[int, int], rng: Rng) -> NDArray[np.uint8]:
    """Draws 4 s of a bird with one plumage pattern in a landscape.

    Args:
        pattern: Number in `PATTERNS`.
        recorder: Whose palette, exposure and grain the pictures have.
        size: Width and height in pixels.
        rng: Draws everything else.

    Returns:
        RGB frames [100, H, W, 3].
    """
    width, height = size
    side = min(size)
    radius = side * rng.uniform(0.30, 0.38)
    colour, opacity = _poses(pattern, radius, side, rng)
    background = _landscape(recorder, width, height, rng) * recorder.exposure
    colour *= recorder.exposure
    time = np.arange(NUM_FRAMES) / FPS
    tempo = rng.uniform(0.3, 0.9, 2)
    reach, phase = rng.uniform(0.01, 0.06, 2), rng.uniform(0.0, 1.0, 2)
    sway = reach * np.sin(2 * np.pi * (tempo * time[:, None] + phase))
    place = np.array((width, height)) / 2 + side * (rng.uniform(-0.09, 0.09, 2) + sway)
    beat = np.sin(2 * np.pi * (rng.uniform(0.8, 2.5) * time + rng.uniform()))
    pose = np.rint((0.5 + 0.5 * beat) * (NUM_POSES - 1)).astype(int)
    grain = rng.standard_normal((4, height, width, 1), np.float32) * recorder.grain
    scenes = np.clip(background + grain, 0.0, 255.0)
    half, clear = colour.shape[1] // 2, 1.0 - opacity
    frames = scenes.astype(np.uint8)[np.arange(NUM_FRAMES) % len(scenes)]
    corners = np.rint(place).astype(int) - half
    for i, (left, upper) in enumerate(corners):
        x0, x1 = max(left, 0), min(left + 2 * half + 1, width)
        y0, y1 = max(upper, 0), min(upper + 2 * half + 1, height)
        cut = (pose[i], slice(y0 - upper, y1 - upper), slice(x0 - left, x1 - left))
        frames[i, y0:y1, x0:x1] = scenes[i % len(scenes), y0:y1, x0:x1] * clear[cut] + colour[cut]
    return frames


def _tone(hz: NDArray[np.float64], rng: Rng) -> Floats:
    """Returns a tone of a given frequency course with three harmonics: no frequency mask hides them all."""
    phase = np.cumsum(hz) / SAMPLE_RATE + rng.uniform()
    turns = (phase % 1.0).astype(np.float32) * np.float32(2 * np.pi)
    weights = (1.0, rng.uniform(0.3, 0.7), rng.uniform(0.15, 0.4))
    samples = np.arange(len(hz), dtype=np.float32)
    ramp = np.minimum(1.0, np.minimum(samples, samples[::-1]) / (0.03 * SAMPLE_RATE))
    wave = np.zeros(len(hz), np.float32)
    for k, weight in enumerate(weights, 1):
        wave += weight * np.sin(k * turns)
    return ramp * wave


def _rattle(num: int, rate_hz: float, rng: Rng) -> Floats:
    """Returns a train of dry clicks: short bursts of noise at a steady rate."""
    step = round(SAMPLE_RATE / rate_hz)
    decay = np.exp(-np.arange(step, dtype=np.float32) / (SAMPLE_RATE * rng.uniform(0.002, 0.005)))
    count = -(-num // step)
    clicks = rng.standard_normal((count, step), np.float32) * decay
    return clicks.ravel()[:num]


def _note(call: int, pitch_hz: float, tempo: float, rng: Rng) -> Floats:
    """Returns one note of a call; `pitch_hz` and `tempo` are the bird's own."""
    name = CALLS[call]
    bend = pitch_hz * rng.uniform(0.95, 1.05)
    if name in ("whistler", "weeper"):
        ends = (bend, bend * rng.uniform(1.9, 2.4))
        num = int(SAMPLE_RATE * rng.uniform(0.28, 0.42) / tempo)
        return _tone(np.geomspace(*(ends if name == "whistler" else ends[::-1]), num), rng)
    num = int(SAMPLE_RATE * rng.uniform(0.45, 0.75) / tempo)
    if name == "warbler":
        wobble = np.sin(2 * np.pi * (9.5 * tempo * np.arange(num) / SAMPLE_RATE + rng.uniform()))
        return _tone(1.45 * bend * 2.0 ** (0.42 * wobble), rng)
    return _rattle(num, 20.0 * tempo * rng.uniform(0.97, 1.03), rng)


def draw_wave(call: int, recorder: Recorder, rng: Rng) -> Floats:
    """Makes 4 s of one call, repeated with pauses, over the recorder's noise.

    Args:
        call: Number in `CALLS`.
        recorder: Whose noise, gain and balance the sound has.
        rng: Draws everything else. The level is drawn without regard to the call.

    Returns:
        Stereo samples [2, 176400] at 44.1 kHz within -1 to 1.
    """
    pitch_hz, tempo = 1000.0 * 2.0 ** rng.uniform(-0.35, 0.55), rng.uniform(0.8, 1.25)
    track = np.zeros(NUM_SAMPLES, np.float32)
    at = int(SAMPLE_RATE * rng.uniform(0.0, 0.2))
    while at < NUM_SAMPLES:
        note = _note(call, pitch_hz, tempo, rng) * rng.uniform(0.6, 1.0)
        end = min(at + len(note), NUM_SAMPLES)
        track[at:end] = note[: end - at]
        at = end + int(SAMPLE_RATE * rng.uniform(0.08, 0.25) / tempo)
    track /= np.sqrt(np.mean(track**2))
    hz = np.fft.rfftfreq(NUM_SAMPLES, 1 / SAMPLE_RATE)
    spectrum = rng.standard_normal((2, len(hz), 2), np.float32).view(np.complex64)[..., 0]
    spectrum *= (np.maximum(hz, 100.0) ** -recorder.noise_slope).astype(np.float32)
    noise = np.fft.irfft(spectrum, NUM_SAMPLES)
    noise *= 10 ** (recorder.noise_db / 20) / np.sqrt(np.mean(noise**2))
    pan = recorder.balance + rng.uniform(-0.3, 0.3)
    wave = noise + track * (np.array(((1 - pan,), (1 + pan,)), np.float32) / math.hypot(1.0, pan))
    level = 10 ** ((recorder.gain_db + rng.uniform(-6.0, 6.0) - 24.0) / 20)
    return np.clip(wave * np.float32(level / np.sqrt(np.mean(wave**2))), -1.0, 1.0)


def encode_video(frames_THWC: NDArray[np.uint8]) -> bytes:
    """Encodes RGB frames as H.264 (high profile, B-frames, GOP 250) in an mp4 of its own.

    One thread, because the number of threads changes the bytes.
    """
    out = io.BytesIO()
    with av.open(out, "w", format="mp4", options={"fflags": "+bitexact"}) as container:
        stream = container.add_stream("libx264", rate=FPS)
        stream.height, stream.width = frames_THWC.shape[1:3]
        stream.pix_fmt = "yuv420p"
        stream.codec_context.thread_count = 1
        stream.codec_context.gop_size = GOP
        stream.codec_context.max_b_frames = 3
        stream.options = {"preset": "veryfast", "crf": "20", "profile": "high", "x264-params": SAME_BYTES}
        for picture in frames_THWC:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, "rgb24")))
        container.mux(stream.encode())
    return out.getvalue()


def encode_audio(wave_CS: Floats) -> bytes:
    """Encodes stereo samples as AAC (96 kbit/s, 44.1 kHz) in an mp4 of its own."""
    out = io.BytesIO()
    with av.open(out, "w", format="mp4", options={"fflags": "+bitexact"}) as container:
        stream = container.add_stream("aac", rate=SAMPLE_RATE, layout="stereo")
        stream.bit_rate = 96_000
        # A fifth of the default's time; and noise substitution would leave noise to each decoder's taste.
        stream.options = {"aac_coder": "fast", "aac_pns": "0", "aac_tns": "0", "aac_is": "0"}
        frame = av.AudioFrame.from_ndarray(np.ascontiguousarray(wave_CS), format="fltp", layout="stereo")
        frame.sample_rate, frame.pts, frame.time_base = SAMPLE_RATE, 0, Fraction(1, SAMPLE_RATE)
        container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return out.getvalue()


def mux(video: bytes, audio: bytes | None) -> bytes:
    """Puts encoded streams into one mp4 without touching them: the packets stay bit-identical."""
    out = io.BytesIO()
    with av.open(out, "w", format="mp4", options={"fflags": "+bitexact"}) as container:
        packets = []
        sources = [av.open(io.BytesIO(data)) for data in (video, audio) if data is not None]
        for source in sources:
            target = container.add_stream_from_template(source.streams[0])
            for packet in source.demux(0):
                if packet.dts is not None:
                    packets.append((float(packet.dts * packet.time_base), packet, target))
        for _, packet, target in sorted(packets, key=lambda p: p[0]):
            packet.stream = target
            container.mux(packet)
        for source in sources:
            source.close()
    return out.getvalue()


def damage(data: bytes, kind: Damage) -> bytes:
    """Breaks an mp4 file.

    Args:
        data: The file.
        kind: `blank` and `torn` overwrite the packets (all, or all after the first 40 %) with zeros, as a
            card gone bad would, and leave the index of the file whole: it opens, and breaks while it is
            decoded. `cut` ends the file before its index and `empty` leaves nothing: these do not open.
            The empty string changes nothing.

    Returns:
        The broken file.
    """
    if not kind:
        return data
    if kind in ("cut", "empty"):
        return data[: int(0.6 * len(data)) if kind == "cut" else 0]
    broken = bytearray(data)
    with av.open(io.BytesIO(data)) as container:
        packets = sorted((p.pos, p.size) for p in container.demux() if p.size)
    for start, size in packets[0 if kind == "blank" else int(0.4 * len(packets)) :]:
        broken[start : start + size] = bytes(size)
    return bytes(broken)


def run_job(job: RenderJob) -> int:
    """Draws, encodes and writes the files of a job, beside and then renamed; returns how many."""
    videos, audios = [], []
    for stream in job.videos:
        recorder = Recorder.draw(np.random.default_rng(stream.recorder))
        videos.append(encode_video(draw_frames(stream.content, recorder, job.size, np.random.default_rng(stream.key))))
    for stream in job.audios:
        recorder = Recorder.draw(np.random.default_rng(stream.recorder))
        audios.append(encode_audio(draw_wave(stream.content, recorder, np.random.default_rng(stream.key))))
    for output in job.outputs:
        data = mux(videos[output.video], None if output.audio is None else audios[output.audio])
        beside = Path(f"{output.path}.tmp")
        beside.write_bytes(damage(data, output.damage))
        beside.replace(output.path)
    return len(job.outputs)


def leave_interrupts_to_the_parent() -> None:
    """Keeps a worker process quiet on Ctrl-C: the parent stops it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
