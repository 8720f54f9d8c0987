"""Writes the manifest of a data set: decodes every file once, counts frames and samples, and lists problems.

Example: `fastav index folder my/clips --out my/manifest.parquet --hold-out fraction:0.2`

`fastav index KIND --help` describes the files that a kind expects. A data set from outside the project is named
`module:attribute`. Problems with single files are written to a .problems.csv file beside the manifest.
"""

from __future__ import annotations

import argparse
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from fastav.core.errors import UserError
from fastav.core.plugin import is_external
from fastav.data.manifest import Manifest, Problem
from fastav.datasets.build_manifest import build_manifest, problems_path
from fastav.datasets.registry import DATASETS, external_dataset

_SHOWN = 3
# Not fatal for published data sets: these problems are part of the data, or come from indexing only a part of it.
_PUBLISHED = ("split_leak", "duplicate_media", "empty_class")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the kinds of data sets, and the options of each kind."""
    kinds = parser.add_subparsers(dest="kind", metavar="KIND", required=True, parser_class=_strict(type(parser)))
    word = next((word for word in getattr(parser, "words", ()) if not word.startswith("-")), "")
    external = {word: external_dataset(word)} if is_external(word) else {}
    for name, module in {**DATASETS, **external}.items():
        summary = (module.__doc__ or "").strip().split("\n")[0]
        sub = kinds.add_parser(
            name, help=summary, description=module.__doc__, formatter_class=argparse.RawTextHelpFormatter
        )
        module.add_arguments(sub)
        sub.add_argument("--out", required=True, type=Path, metavar="FILE", help="manifest to write (.parquet)")
        sub.add_argument("--workers", type=int, default=0, metavar="N", help="processes; default 0: one per core")


def _strict(kind: type[argparse.ArgumentParser]) -> type[argparse.ArgumentParser]:
    """Returns a parser class that rejects unknown options itself.

    A plain subparser passes them to its parent, which cannot suggest the nearest option of the subparser.
    """

    class Strict(kind):  # type: ignore[valid-type, misc]
        def parse_known_args(self, args: Any = None, namespace: Any = None) -> tuple[Any, list[str]]:
            known, unknown = super().parse_known_args(args, namespace)
            if unknown:
                self.error(f"unrecognized arguments: {' '.join(unknown)}")
            return known, unknown

    return Strict


def main(args: argparse.Namespace) -> int:
    """Runs `fastav index KIND ...`; returns 0, even if single files cannot be read.

    Raises:
        UserError: No file can be read, or the manifest has problems that invalidate training (it is written anyway).
    """
    if args.workers < 0:
        raise UserError(f"--workers {args.workers}: expected 0 (one per core) or more")
    console, out = Console(), Path(args.out)
    dataset = external_dataset(args.kind) if is_external(args.kind) else DATASETS[args.kind]
    clip_list = dataset.list_clips(args)
    outputs = {str(path.absolute()) for path in (out, out.with_suffix(".arrow"), problems_path(out))}
    manifest, problems = build_manifest(
        clip_list.clips,
        out,
        workers=args.workers,
        metadata=clip_list.metadata,
        console=console,
        cut=clip_list.cut,
        split=clip_list.split,
        problems=[p for p in clip_list.problems if str(Path(p.path).absolute()) not in outputs],
    )
    if clip_list.published_splits:
        problems = [replace(p, fatal=p.fatal and p.kind not in _PUBLISHED) for p in problems]
    show(console, manifest, problems, clip_list.notes)
    fatal = [problem for problem in problems if problem.fatal]
    if fatal:
        count = f"{len(fatal)} problems that invalidate" if len(fatal) > 1 else "a problem that invalidates"
        raise UserError(f"{out}: written, but has {count} training: {fatal[0].message} (see {problems_path(out)})")
    return 0


def show(console: Console, manifest: Manifest, problems: Sequence[Problem], notes: Sequence[str] = ()) -> None:
    """Prints a summary of the manifest, and the first problems of each kind."""
    hours = manifest.whole("duration_s").sum() / 3600
    console.print(escape(str(manifest.path)), highlight=False, soft_wrap=True)
    table = Table(show_header=False)
    table.add_row("clips", f"{len(manifest)} ({hours:.2f} h)")
    table.add_row("classes", str(len(manifest.classes)))
    table.add_row("splits", ", ".join(f"{escape(name)} {count}" for name, count in manifest.splits.items()))
    for what, column in (("video", "video_codec"), ("audio", "audio_codec")):
        table.add_row(what, escape(_codecs(manifest, column)))
    console.print(table)
    for note in notes:
        console.print(escape(note), highlight=False, soft_wrap=True)
    by_kind: dict[str, list[Problem]] = defaultdict(list)
    for problem in problems:
        by_kind[problem.kind].append(problem)
    for kind, found in sorted(by_kind.items(), key=lambda item: not item[1][0].fatal):
        colour = "red" if found[0].fatal else "yellow"
        console.print(f"[{colour}]{len(found)} x {kind}[/]", highlight=False)
        for problem in found[:_SHOWN]:
            console.print(f"  {escape(problem.message)}", highlight=False, soft_wrap=True)
        if len(found) > _SHOWN:
            console.print(f"  and {len(found) - _SHOWN} more", highlight=False)
    if problems:
        console.print(f"all problems: {escape(str(problems_path(manifest.path)))}", highlight=False, soft_wrap=True)


def _codecs(manifest: Manifest, column: str) -> str:
    counts = Counter(manifest.strings(column).to_pylist())
    clips = ", ".join(f"{name or 'none'} {count}" for name, count in counts.most_common())
    return f"{clips} clips"
