"""The tests mirror the package: `tests/<room>/test_<module>.py`; what several share lies in `helpers`, programs of
several processes in `ranks`, long checks in `acceptance`."""

from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
FILES = ROOT / "tests" / "data_files"
SHARED = ROOT.parent / "shared"
