"""The result of a suite as a JSON file: measurements, machine and versions, in one schema for all suites."""

from __future__ import annotations

import datetime
import json
import os
import platform
import re
import subprocess
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from benchmarks.plot import bars
from benchmarks.timing import MedianInterval, verdict
from fastav.core.atomic_files import write_text
from fastav.core.errors import UserError
from fastav.core.machine import num_cores

SCHEMA = 1
FOLDER = Path(__file__).parent / "results"
_PACKAGES = (
    "fastav", "torch", "torchvision", "torchaudio", "av", "numpy", "timm", "accelerate", "triton",
    "nvidia-dali-cuda130", "torchcodec", "spdl", "decord",
)  # fmt: skip
_REQUIRED: dict[str, type | tuple[type, ...]] = {
    "schema": int, "suite": str, "created": str, "command": str, "git": dict, "machine": dict, "versions": dict,
    "varied": dict, "runs": list, "summary": list, "verdicts": list, "notes": list,
}  # fmt: skip
_KEYS = {
    "runs": {"variant", "repeat"},
    "summary": {"variant", "metric", "median", "ci95"},
    "verdicts": {"a", "b", "metric", "ratio", "ci95", "verdict"},
}


def new(suite: str, command: list[str], varied: dict[str, list[Any]]) -> dict[str, Any]:
    """Returns an empty result.

    Args:
        suite: Name of the suite.
        command: Its command-line arguments.
        varied: Parameters that the suite sweeps, with their values.
    """
    return {
        "schema": SCHEMA,
        "suite": suite,
        "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        # File names without folders: paths on one machine are private, and of no use to others.
        "command": " ".join(["python -m benchmarks", suite, *(Path(w).name if "/" in w else w for w in command)]),
        "git": _git(),
        "machine": machine(),
        "versions": versions(),
        "varied": varied,
        "runs": [],
        "summary": [],
        "verdicts": [],
        "notes": [],
    }


def machine() -> dict[str, Any]:
    """Returns a description of the machine: processor, cores, memory, GPU and driver (None without one)."""
    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        found = re.search(r"model name\s*: (.*)", info.read_text())
        cpu = found[1] if found else cpu
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    ram = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30 if hasattr(os, "sysconf") else None
    return {
        "cpu": cpu, "cores": num_cores(), "ram_gib": round(ram, 1) if ram else None, "gpu": gpu,
        "gpus": torch.cuda.device_count(), "cuda": torch.version.cuda, "driver": _driver(),
    }  # fmt: skip


def write(
    result: dict[str, Any],
    path: Path | None,
    plotted: Mapping[str, str] | None = None,
    colours: Mapping[str, str] | None = None,
) -> Path:
    """Checks a result and writes it as JSON, with a plot next to it.

    Args:
        result: Result of a suite.
        path: The JSON file; None: a file in `benchmarks/results/` named by suite, hardware and date.
        plotted: Metrics to plot, with the label of each; None for no plot.
        colours: See `plot.bars`.

    Returns:
        The path of the JSON file.

    Raises:
        UserError: The result does not follow the schema.
    """
    check(result)
    hardware = str(result["machine"]["gpu"] or f"{result['machine']['cores']}-cores").lower().replace(" ", "-")
    path = path or FOLDER / f"{result['suite']}_{hardware}_{result['created'][:10]}.json"
    write_text(path, json.dumps(result, indent=1) + "\n")
    if plotted is not None:
        bars(result, plotted, path.with_suffix(".png"), colours)
    return path


def summarise(result: dict[str, Any], variant: str, metric: str, found: MedianInterval) -> None:
    """Adds a median with its interval to a result."""
    middle, low, high = found.rounded()
    result["summary"].append({"variant": variant, "metric": metric, "median": middle, "ci95": [low, high]})


def judge(result: dict[str, Any], a: str, b: str, metric: str, found: MedianInterval) -> str:
    """Adds the ratio of two variants, `a` over `b`, with its verdict to a result; returns the verdict."""
    (middle, low, high), word = found.rounded(), verdict(found)
    row = {"a": a, "b": b, "metric": metric, "ratio": middle, "ci95": [low, high], "verdict": word}
    result["verdicts"].append(row)
    return word


def check(result: dict[str, Any]) -> None:
    """Checks a result against the schema.

    Raises:
        UserError: A key is missing or has another type; the message names the first one.
    """
    for key, kind in _REQUIRED.items():
        if not isinstance(result.get(key), kind):
            raise UserError(f'result: "{key}" is {result.get(key)!r}, expected type {getattr(kind, "__name__", kind)}')
    if result["schema"] > SCHEMA:
        raise UserError(f"result: its schema is {result['schema']}, this version reads up to {SCHEMA}")
    for key, required in _KEYS.items():
        for entry in result[key]:
            if missing := required - set(entry):
                raise UserError(f'result: an entry of "{key}" has no {", ".join(sorted(missing))}')


def versions() -> dict[str, str | None]:
    """Returns the versions of Python and of relevant packages; None for a package that is not installed."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = None
    return found


def _git() -> dict[str, Any]:
    def git(*words: str) -> str | None:
        try:
            return subprocess.run(["git", *words], capture_output=True, text=True, check=True).stdout.strip()
        except (OSError, subprocess.CalledProcessError):
            return None

    return {"commit": git("rev-parse", "HEAD"), "dirty": bool(git("status", "--porcelain"))}


def _driver() -> str | None:
    try:
        import pynvml

        pynvml.nvmlInit()
        return str(pynvml.nvmlSystemGetDriverVersion())
    except Exception:  # no driver, or it does not answer
        return None
