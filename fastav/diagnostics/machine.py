"""What a machine has: packages, GPU, video decoder, container, cores, memory, disk; each fact with its verdict."""

from __future__ import annotations

import ctypes
import importlib
import os
import random
import shutil
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal

import torch

from fastav.core.machine import num_cores
from fastav.media.dali.decoder import NVDEC_ENGINES

Verdict = Literal["good", "note", "bad"]

REQUIRED = {
    "torch": "torch", "torchvision": "torchvision", "torchaudio": "torchaudio", "timm": "timm",
    "accelerate": "accelerate", "av": "av", "pyarrow": "pyarrow", "numpy": "numpy", "safetensors": "safetensors",
    "torchmetrics": "torchmetrics", "fsspec": "fsspec",
}  # fmt: skip
"""Packages that fastav cannot do without, and the module by which each is tried."""
_OPTIONAL = {
    "nvidia-dali-cuda130": "decoding on a GPU (pip install 'fastav[dali]')",
    "deepspeed": "ZeRO (pip install 'fastav[deepspeed]')",
    "aiohttp": "shards at http:// (pip install 'fastav[http]')",
    "s3fs": "shards at s3://",
    "gcsfs": "shards at gs://",
}
_RAPID_BYTES = 1 << 28  # read to measure a disk
_CHUNK = 1 << 20
_SPLICE_BYTES = 16 << 10  # about a group of pictures
_SPLICES = 200
_SHM_GIB = 1.0


@dataclass(frozen=True, slots=True)
class Fact:
    """One line of the examination.

    Attributes:
        topic: Such as `GPU`.
        text: What was found.
        verdict: `bad` is wrong for any run, `note` is worth knowing.
    """

    topic: str
    text: str
    verdict: Verdict = "good"


def packages() -> Iterator[Fact]:
    """The packages that are needed, imported, and those that some uses want."""
    yield Fact("fastav", _version("fastav") or "not installed (run from its folder)")
    for name, module in REQUIRED.items():
        found = _version(name)
        try:
            importlib.import_module(module)
            yield Fact(name, found or "version unknown")
        except Exception as error:  # a broken wheel raises anything
            yield Fact(name, f"{found or 'not installed'}: cannot be imported: {error}", "bad")
    for name, use in _OPTIONAL.items():
        found = _version(name)
        yield Fact(name, found or f"not installed; for {use}", "good" if found else "note")


def gpus() -> Iterator[Fact]:
    """GPU, driver, and whether its video decoder can be reached."""
    driver = nvml_state()
    if not torch.cuda.is_available():
        if driver:
            why = f"PyTorch (CUDA {torch.version.cuda}) cannot use it: is its driver older?"
            yield Fact("GPU", f"{driver}, but {why}", "bad")
        else:
            yield Fact("GPU", "none; everything runs on the CPU, slower", "note")
        return
    for number in range(torch.cuda.device_count()):
        told = torch.cuda.get_device_properties(number)
        engines = next((count for word, count in NVDEC_ENGINES.items() if word in told.name), None)
        decoders = f", {engines} NVDEC engines" if engines else ""
        yield Fact("GPU", f"{told.name}, {told.total_memory / 2**30:.0f} GiB, sm_{told.major}{told.minor}{decoders}")
    yield Fact("driver", f"{driver or 'unknown'}, PyTorch's CUDA {torch.version.cuda}")
    yield _nvcuvid()


def _nvcuvid() -> Fact:
    try:
        ctypes.CDLL("libnvcuvid.so.1")
        return Fact("NVDEC", "libnvcuvid.so.1 is there")
    except OSError:
        wanted = "compute,video,utility"
        given = os.environ.get("NVIDIA_DRIVER_CAPABILITIES")
        why = f"NVIDIA_DRIVER_CAPABILITIES is {given!r}, " if given is not None else ""
        return Fact("NVDEC", f"libnvcuvid.so.1 is not there: {why}a container needs {wanted}", "bad")


def host(root: Path | None) -> Iterator[Fact]:
    """Cores, memory, container limits, and the disk that a manifest is on."""
    cores, quota = num_cores(), cpu_quota()
    limited = quota is not None and quota < cores
    text = f"{cores}" + (f", but the container may use {quota:.1f} of them" if limited else "")
    yield Fact("cores", text, "note" if limited else "good")
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    yield Fact("memory", f"{memory:.0f} GiB")
    if in_container():
        given = os.environ.get("NVIDIA_DRIVER_CAPABILITIES", "not set")
        yield Fact("container", f"yes; NVIDIA_DRIVER_CAPABILITIES {given}")
    shm = Path("/dev/shm")
    if shm.is_dir():
        free_gib = shutil.disk_usage(shm).total / 2**30
        small = free_gib < _SHM_GIB
        text = f"{free_gib:.1f} GiB" + ("; NCCL wants more (docker --shm-size)" if small else "")
        yield Fact("shared memory", text, "note" if small else "good")
    if root is not None:
        free_gib = shutil.disk_usage(root).free / 2**30
        yield Fact("free disk", f"{free_gib:.0f} GiB at {root}", "note" if free_gib < 1 else "good")


@dataclass(frozen=True, slots=True)
class Disk:
    """How fast files were read, with the system's cache asked to forget them before.

    Attributes:
        mb_per_s: One after the other, in chunks of 1 MiB.
        splices_per_s: Pieces of 16 KiB at random places, one after the other.
    """

    mb_per_s: float
    splices_per_s: float


def disk(files: Sequence[Path]) -> Disk | None:
    """Measures the disk on some of the user's own files; None where there are none."""
    real = [path for path in files if path.is_file() and path.stat().st_size > _SPLICE_BYTES]
    if not real:
        return None
    for path in real:
        _forget(path)
    read, begun = 0, time.perf_counter()
    for path in real:
        with path.open("rb", buffering=0) as file:
            while read < _RAPID_BYTES and (chunk := file.read(_CHUNK)):
                read += len(chunk)
    rate = read / 1e6 / max(time.perf_counter() - begun, 1e-9)
    for path in real:
        _forget(path)
    draw, begun = random.Random(0), time.perf_counter()
    for _ in range(_SPLICES):
        path = draw.choice(real)
        with path.open("rb", buffering=0) as file:
            os.pread(file.fileno(), _SPLICE_BYTES, draw.randrange(path.stat().st_size - _SPLICE_BYTES))
    return Disk(rate, _SPLICES / max(time.perf_counter() - begun, 1e-9))


def _forget(path: Path) -> None:
    """Asks the system to drop a file from its cache; it may keep what others use."""
    with path.open("rb") as file:
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def nvml_state() -> str | None:
    """Driver and devices by NVML; None without it."""
    try:
        import pynvml

        pynvml.nvmlInit()
        count = pynvml.nvmlDeviceGetCount()
        return f"driver {_text(pynvml.nvmlSystemGetDriverVersion())}, {count} devices"
    except Exception:  # no driver, or one that cannot be asked
        return None


def _text(value: Any) -> str:
    return value.decode() if isinstance(value, bytes) else str(value)


def cpu_quota() -> float | None:
    """Cores that a container's control group allows; None without a limit."""
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        return None if quota == "max" else int(quota) / int(period)
    except (OSError, ValueError):
        return None


def in_container() -> bool:
    """Returns whether this looks like the inside of a container."""
    return Path("/.dockerenv").exists() or Path("/run/.containerenv").exists() or "container" in os.environ
