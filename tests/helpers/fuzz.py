"""Damages media files and packs, and says of every clip what became of it: named, right, or silently altered.

    python -m tests.helpers.fuzz OUT.json MANIFEST [RAW]    loads a manifest in a process whose crash or hang is seen

A clip that loads is right when its frames are those that FFmpeg shows of the damaged file: its presentation times and
its planes, from a plain decode that passes over what FFmpeg refuses.
"""

from __future__ import annotations

import csv
import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import av
import av.error
import av.logging
import numpy as np
from PIL import Image, ImageOps

from fastav.__main__ import main
from fastav.core.errors import MediaError
from fastav.data.clip import Clip
from fastav.data.manifest import Manifest
from fastav.data.plan import Plan, Sampling
from fastav.loader.loader import Loader, Loading
from fastav.media.decoder import DecodeSpec
from fastav.media.demux import read_media
from fastav.media.pyav import PyAV, read_image
from fastav.media.shards.format import table_place
from fastav.media.spectrogram import Frontend
from tests.helpers.media import clicks, numbered, write_media
from tests.helpers.plans import plan_of

NUM_FRAMES, SIZE, WINDOW = 24, 64, 60
_SECONDS = NUM_FRAMES / 25
_HEAD = 2048  # where containers keep what the rest depends on
_PATIENCE_S = 1800
_CODING_LEVELS = 12  # of 255, mean over a frame: what encoding again may cost noise


def write_seeds(folder: Path) -> list[Path]:
    """Writes one file of each kind that people have, small, with sound where the kind has any."""
    folder.mkdir(parents=True, exist_ok=True)
    wave = clicks(_SECONDS, (0.3, 0.6))
    wave += 0.1 * np.random.default_rng(0).normal(size=wave.shape).astype(np.float32)
    both = {"frames": NUM_FRAMES, "wave": wave}
    kinds: dict[str, dict[str, object]] = {
        "bframes.mp4": both | {"options": {"g": "12", "bf": "3"}},
        "open_groups.mkv": both | {"options": {"g": "8", "bf": "2", "x264-params": "open-gop=1"}},
        "broadcast.ts": both | {"options": {"g": "6"}},
        "web.webm": both | {"codec": "libvpx-vp9", "audio_codec": "libopus", "rate": 48_000, "options": {"g": "8"}},
        "hevc.mp4": both | {"codec": "libx265", "options": {"x265-params": "log-level=none:keyint=8"}},
        "asp.avi": both | {"codec": "mpeg4", "audio_codec": "libmp3lame", "options": {"g": "8"}},
        "stills.avi": both | {"codec": "mjpeg", "audio_codec": "pcm_s16le", "pix_fmt": "yuvj420p"},
        "silent.mp4": {"frames": NUM_FRAMES, "options": {"g": "8"}},
        "sound.wav": {"wave": wave, "audio_codec": "pcm_s16le"},
        "sound.flac": {"wave": wave, "audio_codec": "flac"},
        "sound.mp3": {"wave": wave, "audio_codec": "libmp3lame"},
        "sound.ogg": {"wave": wave, "audio_codec": "libopus", "rate": 48_000},
    }
    for name, options in kinds.items():
        write_media(folder / name, **options)  # type: ignore[arg-type]
    picture = Image.fromarray(numbered(5))
    picture.save(folder / "picture.jpg")
    picture.save(folder / "picture.png")
    mel_CML = np.random.default_rng(1).normal(-40, 10, size=(1, 128, WINDOW)).astype(np.float32)
    np.save(folder / "mel.npy", mel_CML)
    return sorted(folder.iterdir())


def damage(data: bytes, rng: np.random.Generator) -> bytes:
    """Returns bytes with some flipped, a stretch zeroed, the end cut off, or a stretch cut out; never the same ones."""
    made, size = bytearray(data), len(data)
    reach = min(size, _HEAD) if rng.random() < 0.3 else size
    at = int(rng.integers(reach))
    kind = ("flip", "zero", "cut", "hole")[int(rng.integers(4))]
    if kind == "flip":
        for place in rng.integers(reach, size=int(rng.integers(1, 33))).tolist():
            made[place] ^= int(rng.integers(1, 256))
    elif kind == "zero":
        stop = min(size, at + int(rng.integers(1, max(2, size // 4))))
        made[at:stop] = bytes(stop - at)
    elif kind == "cut":
        del made[at:]
    else:
        del made[at : at + int(rng.integers(1, max(2, size // 8)))]
    return bytes(made) if bytes(made) != data else damage(data, rng)


def write_damaged(seeds: Sequence[Path], folder: Path, count: int, seed: int) -> list[Path]:
    """Writes `count` damaged copies of the seeds, in turn; returns their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    files = []
    for number in range(count):
        source = seeds[number % len(seeds)]
        files.append(folder / f"damaged_{number:04d}_{source.stem}{source.suffix}")
        files[-1].write_bytes(damage(source.read_bytes(), rng))
    return files


def fastav(*words: object) -> None:
    """Runs a verb that must end well.

    Raises:
        AssertionError: It crashed or failed.
        TimeoutExpired: It hung.
    """
    command = [sys.executable, "-m", "fastav", *map(str, words)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=_PATIENCE_S)
    assert done.returncode == 0, f"{' '.join(command)} ended with {done.returncode}: {done.stderr[-2000:]}"


def load(manifest: Path, raw: Path | None = None) -> dict[str, dict[str, str]]:
    """Loads every clip of a manifest; returns by id `broken`, or digests of what it shows, and `altered`.

    Args:
        manifest: Of raw media, or of a pack.
        raw: Of what the pack was made of: each frame of the pack must then be like one of its source.

    Raises:
        AssertionError: The process crashed.
        TimeoutExpired: It hung.
    """
    out = manifest.with_suffix(".loaded.json")
    words = [sys.executable, "-m", "tests.helpers.fuzz", str(out), str(manifest), *([str(raw)] if raw else [])]
    done = subprocess.run(words, capture_output=True, text=True, timeout=_PATIENCE_S)
    assert done.returncode == 0, f"loading {manifest} ended with {done.returncode}: {done.stderr[-2000:]}"
    found = json.loads(out.read_text())
    assert isinstance(found, dict)
    return found


def named_in(report: Path) -> set[str]:
    """Names of the files, or clips of files, that a report of problems names."""
    with report.open(newline="") as file:
        return {Path(row["path"]).name for row in csv.DictReader(file)}


def judge(files: Sequence[Path], manifest: Path, pack: Path, seen: Mapping[str, str]) -> dict[str, object]:
    """Packs and loads a manifest of whole and damaged files, and counts what became of the damaged ones.

    Args:
        files: The damaged ones.
        manifest: Of raw media, made before or after they were damaged.
        pack: Folder to pack into.
        seen: Digest of the frames of each whole clip, by id, `pack/` before the id for those of the pack.

    Returns:
        Figures; `silent` and `changed` must be empty.
    """
    fastav("pack", manifest, pack, "--max-broken", 1)
    raw, packed = load(manifest), load(pack / "manifest.parquet", manifest)
    indexed, skipped = named_in(manifest.with_suffix(".problems.csv")), named_in(pack / "skipped.csv")
    counts: Counter[str] = Counter()
    silent = []
    for file in files:
        clip = f"{file.parent.name}/{file.name}"
        before, after = raw.get(clip), packed.get(clip)
        if before is None:
            counts["named by index" if file.name in indexed else "lost"] += 1
            silent += [] if file.name in indexed else [f"{clip} is neither indexed nor named"]
            continue
        counts["named by the loader" if "broken" in before else "loaded as FFmpeg shows it"] += 1
        silent += [f"{clip}: {before['altered']}"] if "altered" in before else []
        if after is None:
            counts["named by pack" if file.name in skipped else "lost"] += 1
            silent += [] if file.name in skipped else [f"{clip} is neither packed nor named"]
        else:
            counts["packed as it loads"] += 1
            silent += [f"{clip}, packed: {after.get('altered') or after.get('broken')}"] if len(after) != 2 else []
    now = {name: found.get("frames") for name, found in raw.items()}
    now |= {f"pack/{name}": found.get("frames") for name, found in packed.items()}
    changed = [name for name, digest in seen.items() if now.get(name) != digest]
    return {"files": len(files), **counts, "untouched": len(seen), "silent": silent, "changed": changed}


def digests(raw: Mapping[str, Mapping[str, str]], packed: Mapping[str, Mapping[str, str]]) -> dict[str, str]:
    """The digests for `judge` of what whole files and their pack have loaded as."""
    assert all(len(found) == 2 for found in (*raw.values(), *packed.values())), (raw, packed)
    return {name: found["frames"] for name, found in raw.items()} | {
        f"pack/{name}": found["frames"] for name, found in packed.items()
    }


@dataclass(frozen=True)
class Whole:
    """Whole files, their manifest and pack, and what they load as: made once, as any number of fuzzings compare to it.

    Attributes:
        files: Of the folder `whole` in the folder that was indexed.
        manifest: Of the files.
        pack: Folder of their pack.
        raw: What `load` finds of the manifest.
        packed: What `load` finds of the pack.
    """

    files: list[Path]
    manifest: Path
    pack: Path
    raw: dict[str, dict[str, str]]
    packed: dict[str, dict[str, str]]


def make_whole(work: Path, count: int = 0) -> Whole:
    """Writes, indexes, packs and loads whole files in this process: of them none can crash it.

    Args:
        work: Folder for all of it.
        count: Copies of the seeds, in turn; 0 for one of each.
    """
    seeds = write_seeds(work / "seeds")
    folder, manifest, pack = work / "raw" / "whole", work / "whole.parquet", work / "pack_whole"
    folder.mkdir(parents=True)
    for number in range(count or len(seeds)):
        source = seeds[number % len(seeds)]
        shutil.copyfile(source, folder / f"{number:04d}_{source.stem}{source.suffix}")
    words = ["index", "folder", work / "raw", "--classes", "folder", "--out", manifest]
    assert main([str(word) for word in words]) == 0
    assert main(["pack", str(manifest), str(pack), "--shard-mib", "1"]) == 0
    opened, packed = Manifest.open(manifest), Manifest.open(pack / "manifest.parquet")
    return Whole(sorted(folder.iterdir()), manifest, pack, load_all(opened), load_all(packed, opened))


def fuzz_raw(work: Path, count: int, seed: int, whole: Whole | None = None) -> dict[str, object]:
    """Damages files, and then indexes, packs and loads them beside whole ones."""
    whole = whole or make_whole(work)
    folder = work / "mixed"
    shutil.copytree(whole.files[0].parent, folder / "whole")
    files = write_damaged(whole.files, folder / "damaged", count, seed)
    fastav("index", "folder", folder, "--classes", "folder", "--out", work / "raw.parquet")
    return judge(files, work / "raw.parquet", work / "pack", digests(whole.raw, whole.packed))


def fuzz_stale(work: Path, count: int, seed: int) -> dict[str, object]:
    """Indexes whole files, and then damages some, packs and loads them: the rows promise what was there before."""
    seeds = write_seeds(work / "raw" / "whole")
    damaged = work / "raw" / "damaged"
    files = write_damaged(seeds, damaged, count, seed)
    broken = [file.read_bytes() for file in files]
    for number, file in enumerate(files):
        shutil.copyfile(seeds[number % len(seeds)], file)
    manifest, pack = work / "raw.parquet", work / "pack_whole"
    fastav("index", "folder", work / "raw", "--classes", "folder", "--out", manifest)
    fastav("pack", manifest, pack, "--max-broken", 1)
    seen = digests(load(manifest), load(pack / "manifest.parquet", manifest))
    for file, data in zip(files, broken, strict=True):
        file.write_bytes(data)
    whole = {name: digest for name, digest in seen.items() if damaged.name not in name}
    return judge(files, manifest, work / "pack", whole)


def fuzz_pack(work: Path, count: int, seed: int, whole: Whole | None = None) -> dict[str, object]:
    """Damages `count` clips of a pack of at least twice as many whole files, and cuts some shards off."""
    whole = whole or make_whole(work, 2 * count)
    before = whole.packed
    shutil.copytree(whole.pack, work / "pack")
    manifest = Manifest.open(work / "pack" / "manifest.parquet")
    rng = np.random.default_rng(seed)
    shards = sorted((work.absolute() / "pack" / "shards").iterdir())
    clips = manifest.clips(range(len(manifest)))
    damaged = {clips[row].id for row in rng.choice(len(clips), size=count, replace=False)}
    for clip in clips:
        if clip.id in damaged:
            _damage_in_place(clip, rng)
    cuts = {str(path): int(rng.integers(path.stat().st_size)) for path in shards[-3:]}
    for path, size in cuts.items():
        os.truncate(path, size)
    after = load(manifest.path)
    silent, changed, counts = [], [], Counter[str]()
    for clip in clips:
        now, was = after[clip.id], before[clip.id]
        cut = clip.shard_at + clip.shard_size > cuts.get(clip.shard, sys.maxsize)
        if clip.id in damaged or cut:
            counts["named by the loader" if "broken" in now else "loads as before"] += 1
            silent += [clip.id] if "broken" not in now and now != was else []
        elif now != was:
            changed.append(clip.id)
    words = [sys.executable, "-m", "fastav", "pack", "--verify", str(work / "pack")]
    done = subprocess.run(words, capture_output=True, text=True, timeout=_PATIENCE_S)
    loads = {clip for clip in damaged if "broken" in after[clip]}
    unverified = [clip for clip in loads if clip not in done.stdout]
    figures = {"files": sum(counts.values()), **counts, "untouched": len(clips) - sum(counts.values())}
    return figures | {"silent": silent, "changed": changed, "verify": done.returncode, "unverified": unverified}


def _damage_in_place(clip: Clip, rng: np.random.Generator) -> None:
    """Flips or zeroes bytes of one clip of a shard: in its table as often as anywhere else."""
    begin, size = table_place(clip) if rng.random() < 0.5 else (clip.shard_at, clip.shard_size)
    with Path(clip.shard).open("r+b") as file:
        if rng.random() < 0.5:
            for at in (begin + rng.integers(size, size=int(rng.integers(1, 9)))).tolist():
                file.seek(at)
                old = file.read(1)[0]
                file.seek(at)
                file.write(bytes([old ^ int(rng.integers(1, 256))]))
        else:
            file.seek(begin + int(rng.integers(size)))
            file.write(bytes(min(int(rng.integers(1, 256)), begin + size - file.tell())))


def load_all(manifest: Manifest, raw: Manifest | None = None) -> dict[str, dict[str, str]]:
    """Loads all clips as an evaluation does, and holds what loads against what FFmpeg, or the source, shows."""
    frontend = Frontend()
    sampling = Sampling(frames=4, image_size=SIZE, window=WINDOW, eval_windows=(0,), eval_crop=1.0)
    plan = Plan([(manifest, 1.0)], sampling, seed=0, mel_bands=frontend.num_mels, mel_frames=frontend.num_frames_s)
    decoder = PyAV().build(DecodeSpec(("video", "audio"), SIZE, frontend, WINDOW))
    broken: dict[str, str] = {}
    found: dict[str, dict[str, str]] = {}
    loader = Loader(
        plan, decoder, Loading(workers=2), modalities=("video", "audio"), classes=manifest.classes,
        on_broken=lambda clip, error: broken.update({clip.id: str(error)}),
    )  # fmt: skip
    with loader:
        for batch in loader.batches(("evaluate", start, 8) for start in range(0, len(manifest), 8)):
            assert batch.frames_BTCHW is not None
            assert batch.mel_BWCML is not None
            for name, frames, mel in zip(batch.ids, batch.frames_BTCHW, batch.mel_BWCML, strict=True):
                if name and name not in found:
                    found[name] = {"frames": _digest(frames.numpy()), "mel": _digest(mel.numpy())}
    sources = {} if raw is None else {clip.id: clip for clip in raw.clips(range(len(raw)))}
    for clip in manifest.clips(range(len(manifest))):
        if clip.id in broken:
            found[clip.id] = {"broken": broken[clip.id]}
        elif clip.has_video and (told := unlike(clip, sources[clip.id]) if clip.id in sources else altered(clip)):
            found[clip.id]["altered"] = told
    return found


def unlike(packed: Clip, raw: Clip) -> str:
    """Returns which frames of a pack look like none of their source; nothing where all do."""
    decoder = PyAV().build(DecodeSpec(("video",), SIZE))
    one, two = (
        decoder.decode(clip, [plan_of(range(clip.num_frames), (0, 0, clip.width, clip.height))])[0].frames_TCHW.float()
        for clip in (packed, raw)
    )
    off_T = [float((frame - two).abs().mean((1, 2, 3)).min()) for frame in one]
    wrong = [number for number, off in enumerate(off_T) if off > _CODING_LEVELS]
    return f"frames {wrong[:5]} of {len(one)} are off by up to {max(off_T):.1f} levels" if wrong else ""


class _Film:
    """Keeps times and planes of all frames of a clip, as they are handed out."""

    def __init__(self, clip: Clip) -> None:
        self.numbers = list(range(clip.num_frames))
        self.seen: dict[int, tuple[int | None, str]] = {}

    def take(self, number: int, frame: av.VideoFrame) -> None:
        self.seen[number] = (frame.pts, _digest(frame.to_ndarray()))


def altered(clip: Clip) -> str:
    """Returns which frames of a raw clip are not as FFmpeg shows them; nothing where all are, or the clip is named."""
    if clip.shard:
        return ""  # digests say whether it is what was packed
    if clip.video is None:
        return _altered_picture(clip)
    film = _Film(clip)
    try:
        read_media(clip, film, False)
    except MediaError:
        return ""
    shown = defaultdict(set)
    for pts, digest in shown_by_ffmpeg(str(clip.video)):
        shown[pts].add(digest)
    wrong = [number for number, (pts, digest) in film.seen.items() if digest not in shown[pts]]
    return f"frames {wrong[:5]} of {clip.num_frames}" if wrong else ""


def _altered_picture(clip: Clip) -> str:
    """Holds a still against Pillow, which refuses what ends too soon."""
    assert clip.image is not None
    try:
        mine = read_image(clip.image).astype(np.int16)
    except MediaError:
        return ""
    try:
        with Image.open(clip.image) as picture:
            other = np.asarray(ImageOps.exif_transpose(picture).convert("RGB")).astype(np.int16)
    except (OSError, ValueError, SyntaxError) as error:
        return f"is shown, and Pillow says: {error}"
    if mine.shape != other.shape:
        return f"is {mine.shape}, and Pillow shows {other.shape}"
    off = np.abs(mine - other)
    return f"differs from Pillow's by up to {off.max()} levels" if off.max() > 2 else ""


def shown_by_ffmpeg(path: str) -> list[tuple[int | None, str]]:
    """Times and digests of what FFmpeg decodes, packet by packet from the first on, passing over what it refuses."""
    shown = []
    with av.open(path, metadata_errors="ignore") as container:
        packets = container.demux(container.streams.video[0])
        while True:
            try:
                packet = next(packets, None)
                if packet is None:
                    return shown
                shown += [(frame.pts, _digest(frame.to_ndarray())) for frame in packet.decode()]
            except av.error.FFmpegError as error:
                if packet is None or isinstance(error, av.error.EOFError):
                    return shown


def _digest(array: np.ndarray) -> str:
    return hashlib.sha256(np.ascontiguousarray(array).tobytes()).hexdigest()[:24]


if __name__ == "__main__":
    av.logging.set_level(None)
    opened = [Manifest.open(path) for path in sys.argv[2:]]
    Path(sys.argv[1]).write_text(json.dumps(load_all(opened[0], opened[1] if len(opened) > 1 else None)))
