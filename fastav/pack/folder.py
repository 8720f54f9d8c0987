"""The folder of a pack. Each shard is finished on its own, so a killed run can resume.

    pack.json          settings, source manifest and encoders, written first; totals and quality are added at the end
    shards/000000.tar  clips, in the format described in `fastav.media.shards.format`
    parts/             rows and index of each finished shard; merged and removed at the end
    manifest.parquet   the packed clips, for training
    index.parquet      byte offsets of every member and every unit of every clip, and the digests of the source files
    skipped.csv        clips that could not be read, with the reasons

The numbers in the manifest alone decide which clips go into which shard, before any clip is decoded. The encoders give
the same bytes each time, on every x86-64 machine. A killed run that resumes therefore gives the same bytes as a run
that was not interrupted. A run may resume on another machine if both have AVX2; without AVX2, FFmpeg decodes AAC and
resamples audio with differences in the last bits. A run does not resume a pack that was begun with other encoder
versions, or before x264 was configured for the same output on every CPU; it raises an error instead.
"""

from __future__ import annotations

import contextlib
import csv
import fcntl
import io
import json
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, ClassVar

import msgspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from fastav.core.atomic_files import flush, sha256, write_text, written_beside
from fastav.core.errors import FastavError, UserError
from fastav.data.clip import Clip
from fastav.data.manifest import Manifest, clips_table, write_table
from fastav.data.manifest.store import SCHEMA
from fastav.data.rng import permute
from fastav.media.shards.format import FORMAT_VERSION, ShardWriter, decode_table, table_place
from fastav.pack.quality import Quality, psnr_db
from fastav.pack.settings import PackSettings
from fastav.pack.transcode import PackedClip

PACK_FILE, MANIFEST_FILE, INDEX_FILE, SKIPPED_FILE = "pack.json", "manifest.parquet", "index.parquet", "skipped.csv"
_SHUFFLE_KEY = 0x5EED_0F_9AC4  # arbitrary but fixed
_ESTIMATED = (
    "num_frames", "fps", "num_samples", "channels", "sample_rate", "duration_s", "num_mel_frames",
)  # fmt: skip

_MEMBER = pa.struct([("name", pa.string()), ("offset", pa.int64()), ("size", pa.int64())])
_SOURCE = pa.struct([("path", pa.string()), ("sha256", pa.string()), ("bytes", pa.int64())])
INDEX_SCHEMA = pa.schema(
    [
        ("id", pa.string()),
        ("key", pa.string()),
        ("shard", pa.string()),
        ("members", pa.list_(_MEMBER)),
        ("unit_offset", pa.list_(pa.int64())),
        ("unit_size", pa.list_(pa.uint32())),
        ("unit_kind", pa.list_(pa.uint8())),
        ("unit_crc32", pa.list_(pa.uint32())),
        ("sources", pa.list_(_SOURCE)),
    ]
)
"""Columns of the index. Offsets count from the start of the shard; `unit_kind` contains values of `UnitKind`."""

Skipped = tuple[str, str, str, str]
"""Clip id, file, stage, reason."""


@dataclass
class Shard:
    """A planned shard: its number and the manifest rows that go into it, in order."""

    number: int
    rows: NDArray[np.int64]

    @property
    def name(self) -> str:
        """Path of the tar file relative to the folder of the pack."""
        return f"shards/{self.number:06d}.tar"


@dataclass
class PackFolder:
    """The folder of a pack that is being written or read.

    Args:
        path: The folder.
    """

    path: Path

    def part(self, shard: Shard) -> Path:
        """Returns the path of a finished shard's rows and index, which is removed when the pack is finished."""
        return self.path / "parts" / f"{shard.number:06d}.parquet"

    def has(self, shard: Shard) -> bool:
        """Returns True if a shard is already finished and its tar file still has the recorded size."""
        try:
            note = _note(pq.read_schema(self.part(shard)))
            return (self.path / shard.name).stat().st_size == note["bytes"]
        except (OSError, pa.ArrowException, ValueError, KeyError):
            return False

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Creates the folder if needed, and prevents a second process from packing into it.

        Raises:
            UserError: Another process is packing into the folder, or the path is a file.
        """
        if self.path.exists() and not self.path.is_dir():
            raise UserError(f"{self.path}: expected a new or empty folder, got a file")
        self.path.mkdir(parents=True, exist_ok=True)
        with (self.path / ".lock").open("w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                raise UserError(f"{self.path}: another process is packing into this folder") from None
            yield

    def description(self) -> dict[str, Any] | None:
        """Returns the content of `pack.json`, or None if the file does not exist.

        Raises:
            UserError: The file is damaged or has another format version.
        """
        file = self.path / PACK_FILE
        try:
            content = json.loads(file.read_text(encoding="utf-8"))
            if content["format"] != FORMAT_VERSION:
                raise UserError(
                    f"{file}: expected pack format {FORMAT_VERSION}, got {content['format']}; the pack was written by "
                    "another version of fastav"
                )
            return dict(content)
        except FileNotFoundError:
            return None
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(f"{file}: is not a valid description of a pack ({error})") from None

    def begin(self, manifest: Manifest, settings: PackSettings) -> bool:
        """Starts a pack in a new or empty folder, or checks that the folder contains the same pack.

        Returns:
            True if the pack is already finished.

        Raises:
            UserError: The folder contains something else.
        """
        requested = _description(manifest, settings)
        existing = self.description()
        if existing is None:
            others = sorted(p.name for p in self.path.iterdir() if p.name != ".lock")
            if others:
                raise UserError(f"{self.path}: expected a new or empty folder, found {others[0]}")
            write_text(self.path / PACK_FILE, json.dumps(requested, indent=1))
            return False
        differing = [
            f"{key} is {found.get(key)!r}, requested {expected.get(key)!r}"
            for part in ("settings", "source", "encoders")
            for found, expected in [(existing.get(part, {}), requested[part])]
            for key in sorted(found.keys() | expected.keys())
            if found.get(key) != expected.get(key) and (part, key) != ("source", "manifest")
        ]
        if differing:
            raise UserError(
                f"{self.path}: contains a different pack ({'; '.join(differing)}); delete it or use another folder"
            )
        return bool(existing.get("finished"))

    def finish(self, manifest: Manifest, settings: PackSettings, shards: Sequence[Shard]) -> Manifest:
        """Merges the parts of all shards into the manifest, the index, the list of skipped clips and the totals.

        The index is many times larger than the manifest, so it is written part by part.

        Returns:
            The manifest of the pack.

        Raises:
            UserError: No clip could be packed.
        """
        notes = [_note(pq.read_schema(self.part(shard))) for shard in shards]
        skipped = [tuple(entry) for note in notes for entry in note["skipped"]]
        self._write_skipped(skipped)
        rows, totals = [], _Totals()
        index_schema = INDEX_SCHEMA.with_metadata({"fastav.format": str(FORMAT_VERSION)})
        with (
            written_beside(self.path / INDEX_FILE) as beside,
            pq.ParquetWriter(beside, index_schema, compression="zstd") as writer,
        ):
            for shard in shards:
                part = pq.read_table(self.part(shard)).replace_schema_metadata(None)
                rows.append(part.select([name for name in SCHEMA.names if name in part.column_names]).cast(SCHEMA))
                index = part.select(INDEX_SCHEMA.names).cast(index_schema)
                totals.add(index)
                if len(index):
                    writer.write_table(index, row_group_size=4096)
        whole = pa.concat_tables(rows)
        if not whole.num_rows:
            shutil.rmtree(self.path / "parts")  # so that the next run tries all clips again
            raise UserError(
                f"{manifest.path}: none of the {len(manifest)} clips could be packed (see {self.path / SKIPPED_FILE})"
            )
        metadata = {**manifest.metadata, "pack": json.dumps(msgspec.to_builtins(settings))}
        packed = write_table(self.path / MANIFEST_FILE, whole, manifest.classes, metadata)
        description = _description(manifest, settings) | {"finished": True}
        description["totals"] = {
            "clips": whole.num_rows, "skipped": len(skipped), "shards": len(shards),
            "bytes": sum(note["bytes"] for note in notes), **totals.describe(),
        }  # fmt: skip
        description["quality"] = _quality(notes)
        description["shards"] = {
            shard.name: {"bytes": note["bytes"], "sha256": note["sha256"]}
            for shard, note in zip(shards, notes, strict=True)
        }
        write_text(self.path / PACK_FILE, json.dumps(description, indent=1))
        shutil.rmtree(self.path / "parts")
        return packed

    def _write_skipped(self, skipped: Sequence[Any]) -> None:
        text = io.StringIO()
        writer = csv.writer(text)
        writer.writerow(("clip", "path", "stage", "reason"))
        writer.writerows(skipped)
        write_text(self.path / SKIPPED_FILE, text.getvalue())


@dataclass
class ShardBuild:
    """Writes the clips of one shard in order. `close` finishes the shard; `abandon` deletes it."""

    folder: PackFolder
    shard: Shard
    rows: list[Clip] = field(default_factory=list)
    entries: list[dict[str, Any]] = field(default_factory=list)
    skipped: list[Skipped] = field(default_factory=list)
    qualities: list[Quality] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._beside = self.folder.path / "shards" / f".{self.shard.number:06d}.tar.tmp"
        self._beside.parent.mkdir(parents=True, exist_ok=True)
        self._file = self._beside.open("wb+")
        self._writer = ShardWriter(self._file)

    def add(self, row: int, packed: PackedClip) -> None:
        """Appends the clip of manifest row `row`."""
        key = f"{row:09d}"
        at, size = self._writer.add(key, packed.members)
        clip = replace(packed.clip, shard=str((self.folder.path / self.shard.name).absolute()))
        clip = replace(clip, shard_at=at, shard_size=size)
        self.rows.append(clip)
        units = decode_table(clip, packed.members[0].data)
        begin, members = table_place(clip)[0], []
        for member in packed.members:
            members.append({"name": f"{key}.{member.extension}", "offset": begin, "size": len(member.data)})
            begin += -(-len(member.data) // 512) * 512 + 512
        self.entries.append(
            {
                "id": clip.id, "key": key, "members": members,
                "unit_offset": units.at_U, "unit_size": units.size_U, "unit_kind": units.kind_U,
                "unit_crc32": units.crc_U,
                "sources": [{"path": s.path, "sha256": s.sha256, "bytes": s.num_bytes} for s in packed.sources],
            }
        )  # fmt: skip
        if packed.quality is not None:
            self.qualities.append(packed.quality)

    def close(self) -> None:
        """Closes the tar, flushes it to disk, moves it to its final path, and then writes its rows and index."""
        self._writer.close()
        self._file.close()
        flush(self._beside)
        num_bytes, digest = self._beside.stat().st_size, sha256(self._beside)
        self._beside.replace(self.folder.path / self.shard.name)
        table = clips_table(self.rows, self.folder.path.absolute()) if self.rows else SCHEMA.empty_table()
        for name in INDEX_SCHEMA.names:
            if name not in table.column_names:
                values = pa.array([entry[name] for entry in self.entries], INDEX_SCHEMA.field(name).type)
                table = table.append_column(INDEX_SCHEMA.field(name), values)
        note = {
            "bytes": num_bytes,
            "sha256": digest,
            "skipped": self.skipped,
            "quality": [(q.squared_error, q.ssim, q.num_frames) for q in self.qualities],
        }
        table = table.replace_schema_metadata({"fastav.part": json.dumps(note)})
        with written_beside(self.folder.part(self.shard)) as beside:
            pq.write_table(table, beside, compression="zstd")

    def abandon(self) -> None:
        """Deletes the unfinished tar."""
        self._file.close()
        self._beside.unlink(missing_ok=True)


def plan_shards(manifest: Manifest, settings: PackSettings) -> list[Shard]:
    """Decides which rows go into which shard, from the numbers in the manifest alone. No shard spans two splits."""
    column = {name: manifest.whole(name) for name in _ESTIMATED}
    estimate_N = settings.estimated_bytes(column)
    most = settings.shard_mib * 2**20
    shards: list[Shard] = []
    begin = 0
    for count in manifest.splits.values():
        rows = np.arange(count, dtype=np.int64)
        if settings.shuffle and count:
            rows = permute(rows, count, np.full(count, _SHUFFLE_KEY, np.uint64))
        rows = rows + begin
        number = np.floor((np.cumsum(estimate_N[rows]) - estimate_N[rows]) / most)
        for piece in np.split(rows, np.flatnonzero(np.diff(number)) + 1):
            shards.append(Shard(len(shards), piece))
        begin += count
    return shards


def _description(manifest: Manifest, settings: PackSettings) -> dict[str, Any]:
    """Returns the content of `pack.json` for an unfinished pack. It identifies the pack."""
    return {
        "format": FORMAT_VERSION,
        "settings": msgspec.to_builtins(settings),
        "source": {"manifest": str(manifest.path), "sha256": sha256(manifest.path), "clips": len(manifest)},
        "encoders": {"av": version("av"), "pillow": version("pillow"), "x264": "cpu-independent"},
        "finished": False,
    }


def _note(schema: pa.Schema) -> dict[str, Any]:
    """Returns the metadata of a part: size and digest of its shard, skipped clips and quality."""
    return dict(json.loads((schema.metadata or {})[b"fastav.part"]))


class _Totals:
    """Sums the bytes of members by kind, and of source files. Each source file counts once."""

    _kinds: ClassVar = {"h264": "video", "mjpeg": "video", "flac": "sound", "jpg": "picture", "npy": "mel"}

    def __init__(self) -> None:
        self._sizes = dict.fromkeys(("video", "sound", "picture", "mel"), 0)
        self._sources: dict[str, int] = {}

    def add(self, index: pa.Table) -> None:
        """Adds the index entries of some clips."""
        for members in index.column("members").to_pylist():
            for member in members:
                kind = self._kinds.get(member["name"].split(".", 1)[1])
                if kind is not None:
                    self._sizes[kind] += member["size"]
        for sources in index.column("sources").to_pylist():
            self._sources.update((source["path"], source["bytes"]) for source in sources)

    def describe(self) -> dict[str, int]:
        """Returns the sums by name."""
        sizes = {f"{kind}_bytes": size for kind, size in self._sizes.items()}
        return {"source_bytes": sum(self._sources.values()), **sizes}


def _quality(notes: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Returns the mean quality over the sampled frames. The PSNR is that of the mean squared error."""
    found = [Quality(*entry) for note in notes for entry in note["quality"]]
    if not found:
        return {"num_clips": 0}
    frames = sum(q.num_frames for q in found)
    return {
        "num_clips": len(found),
        "num_frames": frames,
        "psnr_y_db": round(psnr_db(sum(q.squared_error * q.num_frames for q in found) / frames), 2),
        "worst_psnr_y_db": round(psnr_db(max(q.squared_error for q in found)), 2),
        "ssim_y": round(sum(q.ssim * q.num_frames for q in found) / frames, 4),
    }


def no_pack(path: Path) -> FastavError:
    """Returns the error for a folder without a finished pack."""
    return UserError(
        f"{path}: is not a finished pack ({PACK_FILE} is missing or not marked as finished); create it with "
        f"`fastav pack MANIFEST {path}`"
    )
