"""Transcodes the clips of a manifest once into shards, so that training reads and decodes a fraction of the raw media.

  fastav pack MANIFEST OUT    video to H.264 with short closed GOPs, audio to FLAC, pictures to JPEG, in tar shards
  fastav pack --verify OUT    read a whole pack, check every checksum and decode every frame

Then train on OUT/manifest.parquet. A killed pack resumes when the same command is run again. Clips that cannot be read
are listed in OUT/skipped.csv.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import msgspec
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from fastav.core.errors import TooManyBroken, UserError
from fastav.core.machine import num_cores
from fastav.data.manifest import Manifest
from fastav.media.spectrogram import PRESETS as FRONTENDS
from fastav.pack.build import build_pack
from fastav.pack.folder import SKIPPED_FILE, PackFolder
from fastav.pack.settings import PRESETS, PackSettings
from fastav.pack.verify import verify

_SHOWN = 3


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of `fastav pack`."""
    parser.usage = "fastav pack [options] MANIFEST OUT\n       fastav pack --verify [--workers N] OUT"
    parser.add_argument("paths", nargs="+", type=Path, metavar="MANIFEST OUT", help="manifest and output folder")
    defaults = PackSettings()
    parser.add_argument("--verify", action="store_true", help="check a finished pack instead of writing one")
    parser.add_argument(
        "--preset", default=defaults.preset, choices=sorted(PRESETS),
        help="GOP length in frames: small 8, balanced (default) 4, fast 1 (every frame a keyframe, larger files)",
    )  # fmt: skip
    parser.add_argument("--codec", default=defaults.codec, choices=("h264", "mjpeg"), help="video codec; default h264")
    parser.add_argument(
        "--fps", type=float, default=0.0, metavar="HZ", help="lower the frame rate to HZ; default: keep it"
    )
    parser.add_argument(
        "--short-side", type=int, default=defaults.short_side, metavar="PX",
        help="maximum length of the shorter side; default 256",
    )  # fmt: skip
    parser.add_argument(
        "--audio", default=defaults.audio, choices=("mono", "keep"),
        help="mono (default): one channel at the sample rate of --frontend; keep: original channels and sample rate",
    )  # fmt: skip
    parser.add_argument(
        "--frontend", default="ssw60", choices=sorted(FRONTENDS),
        help="spectrogram preset whose sample rate is used; default ssw60, 16 kHz",
    )  # fmt: skip
    parser.add_argument(
        "--shard-mib", type=int, default=defaults.shard_mib, metavar="MIB", help="size of a shard; default 256"
    )
    parser.add_argument("--no-shuffle", action="store_true", help="keep the order of the manifest within each split")
    parser.add_argument("--workers", type=int, default=0, metavar="N", help="processes; default 0: one per core")
    parser.add_argument(
        "--skip-missing", action="store_true", help="skip clips whose files are missing instead of failing"
    )
    parser.add_argument(
        "--max-broken", type=float, default=0.05, metavar="F",
        help="exit with code 3 if more than this share of the clips was skipped; default 0.05",
    )  # fmt: skip


def main(args: argparse.Namespace) -> int:
    """Runs `fastav pack`.

    Returns:
        0, even if single clips could not be read; 1 if `--verify` finds a fault.

    Raises:
        UserError: Wrong arguments, a folder with other content, missing files, or no readable clip.
        TooManyBroken: The pack is finished, but more clips were skipped than `--max-broken` allows.
    """
    console = Console()
    if args.workers < 0:
        raise UserError(f"--workers {args.workers}: expected 0 (one per core) or more")
    if args.verify:
        if len(args.paths) != 1:
            raise UserError(f"fastav pack --verify: got {len(args.paths)} paths, expected one: the folder of a pack")
        return _verify(args.paths[0], args.workers or num_cores(), console)
    if len(args.paths) != 2:
        raise UserError(
            f"fastav pack: got {len(args.paths)} path{'s' * (len(args.paths) > 1)}, expected two: MANIFEST OUT"
        )
    table = {
        "preset": args.preset, "codec": args.codec, "fps": args.fps, "short_side": args.short_side,
        "audio": args.audio, "sample_rate": FRONTENDS[args.frontend].sample_rate, "shard_mib": args.shard_mib,
        "shuffle": not args.no_shuffle,
    }  # fmt: skip
    try:
        settings = msgspec.convert(table, PackSettings)
    except msgspec.ValidationError as error:
        raise UserError(_option(str(error), table)) from None
    source, out = Manifest.open(args.paths[0]), args.paths[1]
    build_pack(source, out, settings, workers=args.workers, skip_missing=args.skip_missing, console=console)
    description = PackFolder(out).description() or {}
    _show(console, out, description)
    clips, skipped = description["totals"]["clips"], description["totals"]["skipped"]
    if skipped > args.max_broken * (clips + skipped):
        raise TooManyBroken(
            f"{out}: packed, but {skipped} of {clips + skipped} clips were skipped, more than --max-broken "
            f"{args.max_broken:g} allows (see {out / SKIPPED_FILE})"
        )
    return 0


def _option(text: str, table: dict[str, Any]) -> str:
    """Rewrites the validation error of a setting to name its option and value."""
    reason, _, place = text.replace("`", "").partition(" - at ")
    name = place.removeprefix("$.")
    return f"fastav pack --{name.replace('_', '-')} {table.get(name)}: {reason[:1].lower()}{reason[1:]}"


def _show(console: Console, out: Path, description: dict[str, Any]) -> None:
    """Prints the contents of the pack, its quality against the source, and the skipped clips."""
    totals, quality = description["totals"], description["quality"]
    console.print(escape(str(out / "manifest.parquet")), highlight=False, soft_wrap=True)
    table = Table(show_header=False)
    table.add_row("clips", f"{totals['clips']} in {totals['shards']} shards")
    ratio = totals["bytes"] / max(totals["source_bytes"], 1)
    table.add_row("bytes", f"{totals['bytes'] / 2**20:.1f} MiB, {ratio:.2f} of the source files")
    kinds = [kind for kind in ("video", "sound", "picture", "mel") if totals[f"{kind}_bytes"]]
    table.add_row("MiB by stream", ", ".join(f"{kind} {totals[f'{kind}_bytes'] / 2**20:.3g}" for kind in kinds))
    if quality["num_clips"]:
        worst = f"worst clip {quality['worst_psnr_y_db']:.1f}"
        text = f"PSNR {quality['psnr_y_db']:.1f} dB ({worst}), SSIM {quality['ssim_y']:.3f}"
        table.add_row(
            "luma against the source", f"{text}; {quality['num_frames']} frames of {quality['num_clips']} clips"
        )
    console.print(table)
    if totals["skipped"]:
        lines = (out / SKIPPED_FILE).read_text(encoding="utf-8").splitlines()[1:]
        were = "clip was" if totals["skipped"] == 1 else "clips were"
        console.print(f"[yellow]{totals['skipped']} {were} skipped[/]", highlight=False)
        for line in lines[:_SHOWN]:
            console.print(f"  {escape(line)}", highlight=False, soft_wrap=True)
        console.print(f"all skipped clips: {escape(str(out / SKIPPED_FILE))}", highlight=False, soft_wrap=True)


def _verify(out: Path, workers: int, console: Console) -> int:
    faults, clips = verify(out, workers, console)
    for fault in faults:
        console.print(f"[red]{escape(fault)}[/]", highlight=False, soft_wrap=True)
    verdict = f"{len(faults)} faults" if faults else "all checksums and frames are correct"
    console.print(f"{escape(str(out))}: {clips} clips, {verdict}", highlight=False, soft_wrap=True)
    return 1 if faults else 0
