"""Properties of this machine: packages, GPU, video decoder, container, cores, memory, disk; each with a verdict."""

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
"""Packages that fastav needs, with the module that is imported to test each."""
_OPTIONAL = {
    "nvidia-dali-cuda130": "decoding on a GPU (pip install 'fastav[dali]')",
    "deepspeed": "ZeRO (pip install 'fastav[deepspeed]')",
    "aiohttp": "shards at http:// (pip install 'fastav[http]')",
    "s3fs": "shards at s3://",
    "gcsfs": "shards at gs://",
}
_RAPID_BYTES = 1 << 28  # read to measure a disk
_CHUNK = 1 << 20
_SPLICE_BYTES = 16 << 10  # about one GOP
_SPLICES = 200
_SHM_GIB = 1.0


@dataclass(frozen=True, slots=True)
class Fact:
    """One property of the machine.

    Attributes:
        topic: Name of the property, such as `GPU`.
        text: Its value or finding.
        verdict: `bad`: must be fixed before any run. `note`: worth knowing. `good`: nothing to do.
    """

    topic: str
    text: str
    verdict: Verdict = "good"


def packages() -> Iterator[Fact]:
    """Yields the required packages, which are imported, and the optional ones."""
    yield Fact("fastav", _version("fastav") or "not installed (run from its folder)")
    for name, module in REQUIRED.items():
        found = _version(name)
        try:
            importlib.import_module(module)
            yield Fact(name, found or "version unknown")
        except Exception as error:  # a broken wheel can raise any type
            yield Fact(name, f"{found or 'not installed'}: cannot be imported: {error}", "bad")
    for name, use in _OPTIONAL.items():
        found = _version(name)
        yield Fact(name, found or f"not installed; needed for {use}", "good" if found else "note")


def gpus() -> Iterator[Fact]:
    """Yields GPUs, driver, and whether the driver's video decoder can be loaded."""
    driver = nvml_state()
    if not torch.cuda.is_available():
        if driver:
            why = f"PyTorch (CUDA {torch.version.cuda}) cannot use it; is the driver too old?"
            yield Fact("GPU", f"{driver}, but {why}", "bad")
        else:
            yield Fact("GPU", "none; everything runs on the CPU, which is slower", "note")
        return
    for number in range(torch.cuda.device_count()):
        gpu = torch.cuda.get_device_properties(number)
        engines = next((count for word, count in NVDEC_ENGINES.items() if word in gpu.name), None)
        decoders = f", {engines} NVDEC engines" if engines else ""
        yield Fact("GPU", f"{gpu.name}, {gpu.total_memory / 2**30:.0f} GiB, sm_{gpu.major}{gpu.minor}{decoders}")
    yield Fact("driver", f"{driver or 'unknown'}, PyTorch's CUDA {torch.version.cuda}")
    yield _nvcuvid()


def _nvcuvid() -> Fact:
    try:
        ctypes.CDLL("libnvcuvid.so.1")
        return Fact("NVDEC", "libnvcuvid.so.1 found")
    except OSError:
        needed = "compute,video,utility"
        capabilities = os.environ.get("NVIDIA_DRIVER_CAPABILITIES")
        why = f"NVIDIA_DRIVER_CAPABILITIES is {capabilities!r}, " if capabilities is not None else ""
        return Fact("NVDEC", f"libnvcuvid.so.1 not found: {why}a container needs {needed}", "bad")


def host(root: Path | None) -> Iterator[Fact]:
    """Yields cores, memory, container limits, and the free space of the disk that holds `root`."""
    cores, quota = num_cores(), cpu_quota()
    limited = quota is not None and quota < cores
    text = f"{cores}" + (f", but the container may use {quota:.1f} of them" if limited else "")
    yield Fact("cores", text, "note" if limited else "good")
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    yield Fact("memory", f"{memory:.0f} GiB")
    if in_container():
        capabilities = os.environ.get("NVIDIA_DRIVER_CAPABILITIES", "not set")
        yield Fact("container", f"yes; NVIDIA_DRIVER_CAPABILITIES {capabilities}")
    shm = Path("/dev/shm")
    if shm.is_dir():
        free_gib = shutil.disk_usage(shm).total / 2**30
        small = free_gib < _SHM_GIB
        text = f"{free_gib:.1f} GiB" + ("; NCCL needs more (docker --shm-size)" if small else "")
        yield Fact("shared memory", text, "note" if small else "good")
    if root is not None:
        free_gib = shutil.disk_usage(root).free / 2**30
        yield Fact("free disk", f"{free_gib:.0f} GiB at {root}", "note" if free_gib < 1 else "good")


@dataclass(frozen=True, slots=True)
class Disk:
    """Read speed of files that were dropped from the system's cache before.

    Attributes:
        mb_per_s: MB/s of sequential reads in chunks of 1 MiB.
        splices_per_s: Reads per second of 16 KiB at random positions, one after another.
    """

    mb_per_s: float
    splices_per_s: float


def disk(files: Sequence[Path]) -> Disk | None:
    """Measures the disk by reading some of the user's files; None if none of them can be used."""
    real = [path for path in files if path.is_file() and path.stat().st_size > _SPLICE_BYTES]
    if not real:
        return None
    for path in real:
        _forget(path)
    read, start_s = 0, time.perf_counter()
    for path in real:
        with path.open("rb", buffering=0) as file:
            while read < _RAPID_BYTES and (chunk := file.read(_CHUNK)):
                read += len(chunk)
    rate = read / 1e6 / max(time.perf_counter() - start_s, 1e-9)
    for path in real:
        _forget(path)
    rng, start_s = random.Random(0), time.perf_counter()
    for _ in range(_SPLICES):
        path = rng.choice(real)
        with path.open("rb", buffering=0) as file:
            os.pread(file.fileno(), _SPLICE_BYTES, rng.randrange(path.stat().st_size - _SPLICE_BYTES))
    return Disk(rate, _SPLICES / max(time.perf_counter() - start_s, 1e-9))


def _forget(path: Path) -> None:
    """Asks the system to drop a file from its cache; pages in use by others may stay."""
    with path.open("rb") as file:
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def nvml_state() -> str | None:
    """Returns the driver version and the number of devices from NVML; None without a working driver."""
    try:
        import pynvml

        pynvml.nvmlInit()
        count = pynvml.nvmlDeviceGetCount()
        return f"driver {_text(pynvml.nvmlSystemGetDriverVersion())}, {count} devices"
    except Exception:  # no driver, or it does not answer
        return None


def _text(value: Any) -> str:
    return value.decode() if isinstance(value, bytes) else str(value)


def cpu_quota() -> float | None:
    """Returns the number of cores that the container's cgroup allows; None without a limit."""
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        return None if quota == "max" else int(quota) / int(period)
    except (OSError, ValueError):
        return None


def in_container() -> bool:
    """Returns whether this process seems to run in a container."""
    return Path("/.dockerenv").exists() or Path("/run/.containerenv").exists() or "container" in os.environ
