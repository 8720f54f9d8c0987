"""The folder of a pack: planned shards, each finished on its own, so that a killed run goes on where it was.

    pack.json          what the pack is made of, written first; totals and quality are added when it is finished
    shards/000000.tar  clips; `fastav.media.shards.format` has the format
    parts/             rows and index of each finished shard; merged and removed at the end
    manifest.parquet   the packed clips, to train on
    index.parquet      byte offsets of every member and every unit of every clip, and the digests of the sources
    skipped.csv        what could not be read, and why

Which clips go into which shard follows from the manifest's numbers alone, before anything is decoded, and encoders give
the same bytes each time, on every x86-64 machine; so a run that was killed ends with the bytes of one that was not. (It
may go on on another machine if both have AVX2: without it, FFmpeg decodes AAC and resamples sound to other last bits.)
One begun with other encoders, or with x264 as it was before it was held to that, is refused and not continued.
"""

from __future__ import annotations

import contextlib
import csv
import fcntl
import io
import json
import shutil
from collections import Counter
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
_SHUFFLE_KEY = 0x5EED_0F_9AC4  # any fixed number
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
"""Columns of the index; offsets count from the start of the shard, `UnitKind` names the kinds."""

Skipped = tuple[str, str, str, str]
"""Clip id, file, stage, reason."""


@dataclass
class Shard:
    """One shard to be: its number and the manifest rows that go into it, in order."""

    number: int
    rows: NDArray[np.int64]

    @property
    def name(self) -> str:
        """File name within the pack's folder."""
        return f"shards/{self.number:06d}.tar"


@dataclass
class PackFolder:
    """A pack being made or looked at.

    Args:
        path: Its folder.
    """

    path: Path

    def part(self, shard: Shard) -> Path:
        """Where a finished shard's rows are kept until the end."""
        return self.path / "parts" / f"{shard.number:06d}.parquet"

    def has(self, shard: Shard) -> bool:
        """Whether a shard was finished before and is still there, to the byte."""
        try:
            note = _note(pq.read_schema(self.part(shard)))
            return (self.path / shard.name).stat().st_size == note["bytes"]
        except (OSError, pa.ArrowException, ValueError, KeyError):
            return False

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Keeps a second process from packing into the same folder.

        Raises:
            UserError: One is at it.
        """
        if self.path.exists() and not self.path.is_dir():
            raise UserError(f"{self.path}: is a file; give a folder that is new or empty")
        self.path.mkdir(parents=True, exist_ok=True)
        with (self.path / ".lock").open("w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                raise UserError(f"{self.path}: another process is packing into this folder") from None
            yield

    def description(self) -> dict[str, Any] | None:
        """What `pack.json` says; None where there is none.

        Raises:
            UserError: It is damaged or of another version.
        """
        file = self.path / PACK_FILE
        try:
            told = json.loads(file.read_text(encoding="utf-8"))
            if told["format"] != FORMAT_VERSION:
                raise UserError(f"{file}: pack version {told['format']}, this fastav reads and writes {FORMAT_VERSION}")
            return dict(told)
        except FileNotFoundError:
            return None
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(f"{file}: not the description of a pack ({error})") from None

    def begin(self, manifest: Manifest, settings: PackSettings) -> bool:
        """Claims the folder for a pack, or finds that it is the same one, begun before; returns whether it is finished.

        Raises:
            UserError: It holds something else.
        """
        asked = _described(manifest, settings)
        there = self.description()
        if there is None:
            others = sorted(p.name for p in self.path.iterdir() if p.name != ".lock")
            if others:
                raise UserError(f"{self.path}: holds {others[0]} and is no pack; give a folder that is new or empty")
            write_text(self.path / PACK_FILE, json.dumps(asked, indent=1))
            return False
        differing = [
            f"{key} = {one.get(key)!r} there, {two.get(key)!r} asked"
            for part in ("settings", "source", "encoders")
            for one, two in [(there.get(part, {}), asked[part])]
            for key in sorted(one.keys() | two.keys())
            if one.get(key) != two.get(key) and (part, key) != ("source", "manifest")
        ]
        if differing:
            raise UserError(
                f"{self.path}: holds another pack ({'; '.join(differing)}); give another folder, or delete that one"
            )
        return bool(there.get("finished"))

    def finish(self, manifest: Manifest, settings: PackSettings, shards: Sequence[Shard]) -> Manifest:
        """Merges what the shards' parts say into manifest, index, skipped clips and totals.

        The index is many times the manifest's size, so that it goes through part by part.
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
            shutil.rmtree(self.path / "parts")  # whoever has put the files right wants them tried again
            raise UserError(
                f"none of the {len(manifest)} clips of {manifest.path} could be packed (see {self.path / SKIPPED_FILE})"
            )
        metadata = {**manifest.metadata, "pack": json.dumps(msgspec.to_builtins(settings))}
        made = write_table(self.path / MANIFEST_FILE, whole, manifest.classes, metadata)
        told = _described(manifest, settings) | {"finished": True}
        told["totals"] = {
            "clips": whole.num_rows, "skipped": len(skipped), "shards": len(shards),
            "bytes": sum(note["bytes"] for note in notes), **totals.describe(),
        }  # fmt: skip
        told["quality"] = _quality(notes)
        told["shards"] = {
            shard.name: {"bytes": note["bytes"], "sha256": note["sha256"]}
            for shard, note in zip(shards, notes, strict=True)
        }
        write_text(self.path / PACK_FILE, json.dumps(told, indent=1))
        shutil.rmtree(self.path / "parts")
        return made

    def _write_skipped(self, skipped: Sequence[Any]) -> None:
        text = io.StringIO()
        writer = csv.writer(text)
        writer.writerow(("clip", "path", "stage", "reason"))
        writer.writerows(skipped)
        write_text(self.path / SKIPPED_FILE, text.getvalue())


@dataclass
class ShardBuild:
    """Writes the clips of one shard as they come, in order; `close` makes it a finished one."""

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
        """Appends one clip."""
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
        """Ends the tar, makes it durable and puts it in its place, and then its part."""
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
        """Removes the unfinished tar."""
        self._file.close()
        self._beside.unlink(missing_ok=True)


def plan_shards(manifest: Manifest, settings: PackSettings) -> list[Shard]:
    """Decides which rows go into which shard, from the manifest's numbers alone; no shard spans two splits."""
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


def _described(manifest: Manifest, settings: PackSettings) -> dict[str, Any]:
    """The identity of a pack."""
    return {
        "format": FORMAT_VERSION,
        "settings": msgspec.to_builtins(settings),
        "source": {"manifest": str(manifest.path), "sha256": sha256(manifest.path), "clips": len(manifest)},
        "encoders": {"av": version("av"), "pillow": version("pillow"), "x264": "cpu-independent"},
        "finished": False,
    }


def _note(schema: pa.Schema) -> dict[str, Any]:
    """What a part says of its shard besides its rows."""
    return dict(json.loads((schema.metadata or {})[b"fastav.part"]))


class _Totals:
    """Adds up bytes by kind, and those of the sources, each file once."""

    _kinds: ClassVar = {"h264": "video", "mjpeg": "video", "flac": "sound", "jpg": "picture", "npy": "mel"}

    def __init__(self) -> None:
        self._sizes = dict.fromkeys(("video", "sound", "picture", "mel"), 0)
        self._sources: dict[str, int] = {}

    def add(self, index: pa.Table) -> None:
        """Takes some clips' entries of the index."""
        for members in index.column("members").to_pylist():
            for member in members:
                kind = self._kinds.get(member["name"].split(".", 1)[1])
                if kind is not None:
                    self._sizes[kind] += member["size"]
        for sources in index.column("sources").to_pylist():
            self._sources.update((source["path"], source["bytes"]) for source in sources)

    def describe(self) -> dict[str, int]:
        """The sums."""
        sizes = {f"{kind}_bytes": size for kind, size in self._sizes.items()}
        return {"source_bytes": sum(self._sources.values()), **sizes}


def _quality(notes: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Mean over the sampled frames; the PSNR is that of the mean error, and that of the worst clip is beside it."""
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


def count_reasons(skipped: Sequence[Skipped]) -> Counter[str]:
    """How many clips were skipped at each stage."""
    return Counter(stage for _, _, stage, _ in skipped)


def no_pack(path: Path) -> FastavError:
    """The error for a folder that holds no finished pack."""
    return UserError(f"{path}: no finished pack (no {PACK_FILE} that says so); `fastav pack MANIFEST {path}` makes one")
