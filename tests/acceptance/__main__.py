"""`python -m tests.acceptance [ROW ...]`: runs the long checks that have not passed yet for this code."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
import time
from pathlib import Path

from tests.acceptance.cluster_rows import CLUSTER_ROWS
from tests.acceptance.fuzz_rows import FUZZ_ROWS
from tests.acceptance.image_rows import IMAGE_ROWS
from tests.acceptance.model_rows import MODEL_ROWS
from tests.acceptance.old_rows import OLD_ROWS
from tests.acceptance.pack_rows import PACK_ROWS
from tests.acceptance.rows import ROWS
from tests.acceptance.scale_rows import SCALE_ROWS
from tests.acceptance.slurm_rows import SLURM_ROWS
from tests.acceptance.speed_rows import SPEED_ROWS

ALL = (
    ROWS | OLD_ROWS | PACK_ROWS | SCALE_ROWS | FUZZ_ROWS | MODEL_ROWS | CLUSTER_ROWS | SLURM_ROWS | IMAGE_ROWS
    | SPEED_ROWS
)  # fmt: skip

FOLDER = Path("acceptance")


def code_version() -> str:
    """A digest of every file that is tracked or would be, so that a row is run again once anything has changed."""
    listed = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard"], capture_output=True, text=True, check=True
    )
    digest = hashlib.sha256()
    for name in sorted(listed.stdout.splitlines()):
        if Path(name).is_file() and Path(name).suffix not in (".md", ".png"):
            digest.update(name.encode() + b"\0" + Path(name).read_bytes())
    return digest.hexdigest()[:16]


def main(names: list[str]) -> int:
    """Runs the named rows, or all of them; returns 1 when one failed."""
    FOLDER.mkdir(exist_ok=True)
    version, failed = code_version(), []
    unknown = [name for name in names if name not in ALL]
    if unknown:
        print(f"no such row: {', '.join(unknown)}; known: {', '.join(ALL)}", file=sys.stderr)
        return 2
    for name in names or ALL:
        file = FOLDER / f"{name}.json"
        if file.exists():
            before = json.loads(file.read_text())
            if before["passed"] and before["version"] == version:
                print(f"{name:<12} passed before: {before['figure']}")
                continue
        print(f"{name:<12} {ALL[name].__doc__.splitlines()[0]}", flush=True)
        started = time.time()
        work = FOLDER / name
        try:
            figure, passed = ALL[name](work)
        except Exception as error:
            figure, passed = {"error": f"{type(error).__name__}: {error}"}, False
        took = time.time() - started
        result = {
            "row": name, "command": f"python -m tests.acceptance {name}", "figure": figure, "passed": passed,
            "version": version, "seconds": round(took, 1),
        }  # fmt: skip
        file.write_text(json.dumps(result, indent=1))
        print(f"{name:<12} {'PASSED' if passed else 'FAILED'} in {took:.0f} s: {json.dumps(figure)}", flush=True)
        failed += [] if passed else [name]
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
