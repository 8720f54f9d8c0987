"""The rules of the house: sizes, names, one word for one thing, and what may not be imported."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests import ROOT

PACKAGES = ("fastav", "kernels/fastav_kernels", "benchmarks")
FILES = sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))
TREES = {path.relative_to(ROOT).as_posix(): ast.parse(path.read_text(encoding="utf-8")) for path in FILES}

# Rooms of rows and plans, and what opens and probes media: their processes start in a fraction of torch's time.
WITHOUT_TORCH = ("fastav.commands.index", "fastav.data.plan", "fastav.media.open_file", "fastav.media.probe")


def public_classes() -> Iterator[tuple[str, str]]:
    for path, tree in TREES.items():
        for node in tree.body:
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                yield node.name, path


def test_no_two_public_classes_have_one_name():
    places = defaultdict(list)
    for name, path in public_classes():
        places[name].append(path)
    assert {name: paths for name, paths in places.items() if len(paths) > 1} == {}


@pytest.mark.parametrize("path", list(TREES))
def test_files_and_functions_stay_small(path):
    assert len((ROOT / path).read_text(encoding="utf-8").splitlines()) <= (300 if path == "fastav/train.py" else 600)
    for node in ast.walk(TREES[path]):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            body = node.body[1:] if ast.get_docstring(node) else node.body
            length = body[-1].end_lineno - body[0].lineno + 1 if body else 0
            assert length <= 60, f"{path}:{node.lineno}: {node.name} has {length} lines"


def test_no_module_is_named_for_no_purpose():
    vague = {"utils", "util", "helpers", "helper", "common", "misc", "tools", "legacy"}
    assert [path for path in TREES if set(Path(path).with_suffix("").parts) & vague] == []


def test_every_room_and_module_says_what_it_is():
    assert [path for path, tree in TREES.items() if not (ast.get_docstring(tree) or "").strip()] == []


def test_faces_of_rooms_import_nothing():
    """A room's `__init__.py` is its sign; importing one module of a room must not load the others."""
    faces = sorted((ROOT / "fastav").glob("*/__init__.py"))
    assert len(faces) >= 16
    for face in faces:
        imports = [node for node in ast.parse(face.read_text()).body if isinstance(node, ast.Import | ast.ImportFrom)]
        assert imports == [], face


@pytest.mark.parametrize("module", WITHOUT_TORCH)
def test_rows_plans_and_probes_load_no_torch(module):
    script = (
        f"import sys, {module}\n"
        "heavy = {'torch', 'torchvision', 'torchaudio', 'timm', 'accelerate', 'scipy', 'matplotlib', 'pandas'}\n"
        "sys.exit(', '.join(sorted(heavy & set(sys.modules))) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, f"{module} imports {done.stderr}"


def test_the_help_of_index_loads_no_torch():
    script = (
        "import sys\nfrom fastav.__main__ import main\n"
        "try:\n    main(['index', 'folder', '--help'])\nexcept SystemExit:\n    pass\n"
        "sys.exit('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    assert "--out" in done.stdout


def test_the_import_law_names_rooms_only():
    """So that a new module, data set or verb never edits it."""
    import tomllib

    law = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    rooms = next(contract for contract in law if contract.get("containers") == ["fastav"])
    assert rooms["exhaustive"] is True
    named = {name for layer in rooms["layers"] for name in layer.split(" | ")}
    own = {path.stem for path in (ROOT / "fastav").glob("*.py")} | {
        path.name for path in (ROOT / "fastav").iterdir() if (path / "__init__.py").exists()
    }
    assert named == own - {"__init__"}


def texts(place: Path) -> Iterator[str]:
    """The text of a page, or the texts within a Python file."""
    text = place.read_text(encoding="utf-8")
    if place.suffix != ".py":
        yield text
        return
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value


def import_lines() -> list[str]:
    """The imports of this project in programs that are texts, and in pages: no linter and no import reads those."""
    places = [path for folder in ("tests", "benchmarks", "kernels") for path in (ROOT / folder).rglob("*.py")]
    places += [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), ROOT / "kernels" / "README.md"]
    package = r"(?:fastav|fastav_kernels|benchmarks)(?:\.[a-z]\w*)*"
    form = re.compile(rf"^\s*(from {package} import [A-Za-z]\w*(?:, \w+)*)$", re.MULTILINE)
    return sorted({line for place in places for text in texts(place) for line in form.findall(text)})


@pytest.mark.parametrize("line", import_lines())
def test_imports_in_programs_and_pages_exist(line):
    exec(line, {})
