"""Rows of the model and its kernels."""

from __future__ import annotations

import hashlib
import json
import os
import re
import sys
from pathlib import Path

from tests.acceptance.rows import RUNS, Failed, Result, call, fastav, fresh, top1
from tests.helpers.attention_cases import KINDS

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


SIZES = [(tokens, frames) for tokens in (1, 50, 65, 196, 197, 201) for frames in (1, 3, 8)]


def interpreter(work: Path) -> Result:
    """The kernels in Triton's interpreter at every size: fp32 <= 1e-5, fp16 <= 1e-3, gradients too.

    About 100 minutes of one core, most of them for 1,600 tokens in one sequence; sizes that were run for these kernels
    are not run again.
    """
    digest = hashlib.sha256()
    for file in sorted([*Path("kernels").rglob("*.py"), *Path("tests/kernels/interpreted").glob("*.py")]):
        digest.update(file.read_bytes())
    kept = work / f"{digest.hexdigest()[:16]}.json"
    if not kept.exists():
        fresh(work)
    found: dict[str, list[list[float]]] = json.loads(kept.read_text()) if kept.exists() else {}
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    report, common = (
        work / "report.xml",
        ("-q", "-n", "2", "-p", "no:cacheprovider", "-m", "slow or not slow", "--timeout", "3600"),
    )
    for tokens, frames in sorted(SIZES, key=lambda size: size[0] * size[1]):
        if f"{tokens}-{frames}" in found:
            continue
        names = [f"test_every_size[{tokens}-{frames}-{z}-{kind}]" for z in (0, 1, 4, 5) for kind in KINDS]
        call(
            sys.executable, "-m", "pytest", *common, f"--junitxml={report}",
            *(f"tests/kernels/interpreted/test_attention.py::{name}" for name in names), env=environment, timeout=7200,
        )  # fmt: skip
        told = re.findall(r'<property name="(float\w+)" value="([^"]+)"', report.read_text())
        errors = [[float(value) for name, value in told if name == dtype] for dtype in ("float32", "float16")]
        if any(len(one) != len(names) for one in errors):
            raise Failed(f"{tokens} tokens, {frames} frames: {[len(one) for one in errors]} of {len(names)} sizes")
        found[f"{tokens}-{frames}"] = errors
        kept.write_text(json.dumps(found))
    rest = call(
        sys.executable, "-m", "pytest", "-q", "-n", "2", "tests/kernels/interpreted", "-m", "not slow", env=environment
    )
    worst = [max(max(errors[n]) for errors in found.values()) for n in (0, 1)]
    figures = {
        "sizes": sum(len(errors[0]) for errors in found.values()), "largest error in float32": worst[0],
        "largest error in float16": worst[1], "the others": rest.stdout.strip().splitlines()[-1],
    }  # fmt: skip
    return figures, worst[0] <= 1e-5 and worst[1] <= 1e-3 and figures["sizes"] == 216


def gate(work: Path) -> Result:
    """Every tile plan compiled for sm_80, sm_90 and sm_100, with what it may use."""
    words = ["-k", "compiles or sm_90 or architectures", "-m", "slow or not slow"]
    done = call(
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "tests/kernels/test_bottleneck_attention.py",
        *words,
    )
    return {"pytest": done.stdout.strip().splitlines()[-1]}, " passed" in done.stdout


def parity(work: Path) -> Result:
    """The authors' outputs: 15 cases in float64 and float32, gradients, and both starts from an image ViT."""
    words = ["tests/model/fusion/test_mbt.py", "-k", "authors", "-p", "no:cacheprovider"]
    done = call(sys.executable, "-m", "pytest", "-q", *words)
    return {"pytest": done.stdout.strip().splitlines()[-1]}, " passed" in done.stdout and "skipped" not in done.stdout


def references(work: Path) -> Result:
    """What tests compare to: librosa's stored numbers against librosa, Inductor's code compiled and run."""
    words = [
        "tests/media/test_spectrogram.py",
        "tests/model/test_compiled_graph.py",
        "-m",
        "slow",
        "-p",
        "no:cacheprovider",
    ]
    done = call(sys.executable, "-m", "pytest", "-q", *words)
    return {"pytest": done.stdout.strip().splitlines()[-1]}, " passed" in done.stdout and "skipped" not in done.stdout


MODEL_ROWS = {
    "modular": modular, "interpreter": interpreter, "gate": gate, "parity": parity, "references": references,
}  # fmt: skip
