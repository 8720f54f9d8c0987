"""Rows of the model and its kernels."""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path

from tests.acceptance.rows import RUNS, Failed, Result, call, fastav, fresh, top1

CHANCE = 25.0  # four classes


def modular(work: Path) -> Result:
    """Classes that only both together tell: mid-fusion >= 90 %, score and late <= chance + 10, single ones chance."""
    fresh(work)
    pairs, sums = work / "pairs", work / "sums"
    fastav("synth", str(pairs))
    fastav("synth", str(sums), "--task", "modular")
    # What a pattern and a call look and sound like is learned where single modalities can learn something.
    for name in ("video", "audio"):
        recipe = f"launch/recipes/quickstart_{name}.toml"
        fastav(
            "train", recipe, "--out", str(work / f"start_{name}"), "--data.manifest", str(pairs / "manifest.parquet")
        )
    found = {}
    for name in RUNS:
        starts = (
            [f"--model.{m}.init_from" for m in ("video", "audio")] if name not in ("video", "audio", "score") else []
        )
        words = [w for key in starts for w in (key, str(work / f"start_{key.split('.')[1]}"))]
        if name in ("video", "audio"):
            words = [f"--model.{name}.init_from", str(work / f"start_{name}")]
        fastav(
            "train", f"launch/recipes/modular_{name}.toml", "--out", str(work / "runs" / name), "--data.manifest",
            str(sums / "manifest.parquet"), *words,
        )  # fmt: skip
        found[name] = round(top1(work / "runs" / name), 2)
    single = all(abs(found[name] - CHANCE) <= 10 for name in ("video", "audio"))
    additive = all(found[name] <= CHANCE + 10 for name in ("score", "late"))
    return dict(found), found["bottleneck"] >= 90 and additive and single


def interpreter(work: Path) -> Result:
    """The kernels in Triton's interpreter at every size: fp32 <= 1e-5, fp16 <= 1e-3, gradients too."""
    fresh(work)
    report = work / "report.xml"
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = call(
        sys.executable, "-m", "pytest", "-q", "-n", "2", "-p", "no:cacheprovider", f"--junitxml={report}",
        "tests/interpreted", "-m", "slow or not slow", env=environment,
    )  # fmt: skip
    figures: dict[str, object] = {"pytest": done.stdout.strip().splitlines()[-1]}
    told = re.findall(r'<property name="(float\w+)" value="([^"]+)"', report.read_text())
    for dtype in ("float32", "float16"):
        errors = [float(value) for name, value in told if name == dtype]
        if len(errors) < 200:
            raise Failed(f"{len(errors)} sizes in {dtype}, 216 expected")
        figures[f"largest error in {dtype}"] = max(errors)
    return figures, "failed" not in done.stdout and "skipped" not in done.stdout


def gate(work: Path) -> Result:
    """Every tile plan compiled for sm_80, sm_90 and sm_100, with what it may use."""
    words = ["-k", "compiles or sm_90 or architectures", "-m", "slow or not slow"]
    done = call(sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/test_kernels.py", *words)
    return {"pytest": done.stdout.strip().splitlines()[-1]}, " passed" in done.stdout


def parity(work: Path) -> Result:
    """The authors' outputs: 15 cases in float64 and float32, gradients, and both starts from an image ViT."""
    words = ["tests/test_mbt.py", "-k", "authors", "-p", "no:cacheprovider"]
    done = call(sys.executable, "-m", "pytest", "-q", *words)
    return {"pytest": done.stdout.strip().splitlines()[-1]}, " passed" in done.stdout and "skipped" not in done.stdout


MODEL_ROWS = {"modular": modular, "interpreter": interpreter, "gate": gate, "parity": parity}
