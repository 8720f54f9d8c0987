"""The row about damage: files and packs with bytes flipped, cut or zeroed, through index, pack and load."""

from __future__ import annotations

from pathlib import Path

from tests.acceptance.rows import Result, fresh
from tests.helpers import fuzz

_ROUTES = {"raw": (fuzz.fuzz_raw, 1000), "stale": (fuzz.fuzz_stale, 400), "packed": (fuzz.fuzz_pack, 600)}


def fuzzed(work: Path) -> Result:
    """2,000 damaged files and packed clips: no crash, no hang, each named or as FFmpeg shows it, the rest untouched."""
    fresh(work)
    figures: dict[str, object] = {}
    good = True
    for name, (route, count) in _ROUTES.items():
        (work / name).mkdir()
        found = route(work / name, count, 2026)
        figures[name] = found
        good = good and not found["silent"] and not found["changed"] and not found.get("unverified")
    return figures, good


FUZZ_ROWS = {"fuzz": fuzzed}
