"""Packs the clips of a manifest once, so that training reads and decodes a fraction of what raw media cost.

  fastav pack MANIFEST OUT          video to H.264 in short closed groups, sound to FLAC, pictures to JPEG, in tars
  fastav pack --verify OUT          reads a pack whole, checks every checksum and decodes every frame

Train on OUT/manifest.parquet. Packing goes on where it was killed; what cannot be read is named in OUT/skipped.csv.
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
    """Adds the verb's options."""
    parser.add_argument("paths", nargs="+", type=Path, metavar="MANIFEST OUT", help="or, with --verify, OUT alone")
    defaults = PackSettings()
    parser.add_argument("--verify", action="store_true", help="check a finished pack instead of making one")
    parser.add_argument(
        "--preset", default=defaults.preset, choices=sorted(PRESETS),
        help="small: groups of 8 frames; balanced (default): of 4; fast: every frame alone, larger files",
    )  # fmt: skip
    parser.add_argument("--codec", default=defaults.codec, choices=("h264", "mjpeg"), help="default: h264")
    parser.add_argument("--fps", type=float, default=0.0, metavar="HZ", help="lower the frame rate; default: keep it")
    parser.add_argument(
        "--short-side", type=int, default=defaults.short_side, metavar="PX", help="longest shorter side; default 256"
    )
    parser.add_argument(
        "--audio", default=defaults.audio, choices=("mono", "keep"),
        help="mono (default): one channel at the rate of --frontend; keep: channels and rate as they are",
    )  # fmt: skip
    parser.add_argument(
        "--frontend", default="ssw60", choices=sorted(FRONTENDS), help="whose sample rate; default ssw60, 16 kHz"
    )
    parser.add_argument("--shard-mib", type=int, default=defaults.shard_mib, metavar="MIB", help="default 256")
    parser.add_argument("--no-shuffle", action="store_true", help="keep the manifest's order within each split")
    parser.add_argument("--workers", type=int, default=0, metavar="N", help="processes; 0 (default): one a core")
    parser.add_argument(
        "--skip-missing", action="store_true", help="leave out clips whose files are gone, instead of stopping there"
    )
    parser.add_argument(
        "--max-broken", type=float, default=0.05, metavar="F",
        help="exit with 3 where more than this share was left out; default 0.05",
    )  # fmt: skip


def main(args: argparse.Namespace) -> int:
    """Runs `fastav pack`; returns 0, also where single clips could not be read; 1 where a pack fails its check.

    Raises:
        UserError: Wrong arguments, a folder that holds something else, files that are gone, or nothing to read.
        TooManyBroken: The pack is finished, but lacks more clips than `--max-broken` allows.
    """
    console = Console()
    if args.workers < 0:
        raise UserError(f"--workers {args.workers}: expected 0 (one a core) or more")
    if args.verify:
        if len(args.paths) != 1:
            raise UserError(f"fastav pack --verify: got {len(args.paths)} paths, expected one, the folder of a pack")
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
            f"{out}: is packed, but {skipped} of {clips + skipped} clips had to be left out, more than the share "
            f"{args.max_broken:g} of --max-broken (see {out / SKIPPED_FILE})"
        )
    return 0


def _option(text: str, table: dict[str, Any]) -> str:
    """Rewrites the error of a setting to name the option and the value on the command line."""
    reason, _, place = text.replace("`", "").partition(" - at ")
    name = place.removeprefix("$.")
    return f"fastav pack --{name.replace('_', '-')} {table.get(name)}: {reason[:1].lower()}{reason[1:]}"


def _show(console: Console, out: Path, description: dict[str, Any]) -> None:
    """Prints what the pack holds, how good it is, and what was left out."""
    totals, quality = description["totals"], description["quality"]
    console.print(escape(str(out / "manifest.parquet")), highlight=False, soft_wrap=True)
    table = Table(show_header=False)
    table.add_row("clips", f"{totals['clips']} in {totals['shards']} shards")
    ratio = totals["bytes"] / max(totals["source_bytes"], 1)
    table.add_row("bytes", f"{totals['bytes'] / 2**20:.1f} MiB, {ratio:.2f} of the sources'")
    kinds = [kind for kind in ("video", "sound", "picture", "mel") if totals[f"{kind}_bytes"]]
    table.add_row("of these, MiB", ", ".join(f"{kind} {totals[f'{kind}_bytes'] / 2**20:.3g}" for kind in kinds))
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
        console.print(f"all of them: {escape(str(out / SKIPPED_FILE))}", highlight=False, soft_wrap=True)


def _verify(out: Path, workers: int, console: Console) -> int:
    faults, clips = verify(out, workers, console)
    for fault in faults:
        console.print(f"[red]{escape(fault)}[/]", highlight=False, soft_wrap=True)
    verdict = f"{len(faults)} faults" if faults else "every byte and every frame is right"
    console.print(f"{escape(str(out))}: {clips} clips, {verdict}", highlight=False, soft_wrap=True)
    return 1 if faults else 0
