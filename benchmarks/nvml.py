"""Reads energy, clocks, throttling and utilisation of this process's GPU from NVML; changes nothing."""

from __future__ import annotations

import itertools
import threading
import time
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import torch

_EVERY_S = 0.05
# Bits of nvmlDeviceGetCurrentClocksEventReasons (nvml.h) that mean that the GPU is throttled.
_THROTTLED = {
    0x4: "power cap", 0x8: "hardware slowdown", 0x20: "thermal, software", 0x40: "thermal, hardware",
    0x80: "power brake",
}  # fmt: skip


@dataclass(slots=True)
class Watched:
    """Measurements of a GPU over a period of time; None where the GPU does not report a value.

    Attributes:
        joules: Energy, from the GPU's counter or else integrated from samples of the power.
        sm_mhz: Lowest and highest clock of the multiprocessors, MHz.
        memory_mhz: Lowest and highest clock of the memory, MHz.
        throttled: Reasons for which the GPU was throttled; empty if it was not.
        sm_pct: Mean percentage of the time in which a kernel ran.
        nvdec_pct: Mean utilisation of the video decoder, percent.
    """

    joules: float | None = None
    sm_mhz: tuple[int, int] | None = None
    memory_mhz: tuple[int, int] | None = None
    throttled: list[str] | None = None
    sm_pct: float | None = None
    nvdec_pct: float | None = None


class Gpu:
    """A GPU in NVML.

    Args:
        nvml: The initialised module `pynvml`.
        handle: NVML's handle of the GPU.
    """

    def __init__(self, nvml: Any, handle: Any) -> None:
        self._nvml, self._handle = nvml, handle

    @classmethod
    def of(cls, device: torch.device) -> Gpu | None:
        """Returns the GPU that torch calls `device` (NVML may number it differently); None without NVML."""
        if device.type != "cuda":
            return None
        try:
            import pynvml

            pynvml.nvmlInit()
            uuid = str(torch.cuda.get_device_properties(device).uuid)
            name = uuid if uuid.startswith(("GPU-", "MIG-")) else f"GPU-{uuid}"
            return cls(pynvml, pynvml.nvmlDeviceGetHandleByUUID(name))
        except Exception:  # no driver, or a container without the capability `utility`
            return None

    def ask(self, name: str, *words: Any) -> Any:
        """Returns the result of an NVML function for this GPU; None if the function fails."""
        try:
            return getattr(self._nvml, name)(self._handle, *words)
        except Exception:  # not supported by this GPU, or not permitted in this container
            return None

    def facts(self) -> dict[str, Any]:
        """Returns settings that affect speed: ECC, persistence, power limit, other processes, temperature."""
        ecc, others = self.ask("nvmlDeviceGetEccMode"), self.ask("nvmlDeviceGetComputeRunningProcesses")
        limit = self.ask("nvmlDeviceGetPowerManagementLimit")
        return {
            "ecc": None if ecc is None else bool(ecc[0]),
            "persistence": self.ask("nvmlDeviceGetPersistenceMode"),
            "power_limit_w": None if limit is None else limit / 1e3,
            "processes": None if others is None else len(others),
            "temperature_c": self.ask("nvmlDeviceGetTemperature", 0),
        }

    def energy_j(self) -> float | None:
        """Returns the energy since the driver was loaded, joules; None for GPUs before Volta."""
        counted = self.ask("nvmlDeviceGetTotalEnergyConsumption")
        return None if counted is None else counted / 1e3

    def power_w(self) -> float | None:
        """Returns the current power, watts."""
        found = self.ask("nvmlDeviceGetPowerUsage")
        return None if found is None else found / 1e3


class Watch:
    """Context manager that samples a GPU from a thread; afterwards `found` holds the measurements.

    Args:
        gpu: The GPU; None: nothing is measured.
        every_s: Seconds between samples.
    """

    def __init__(self, gpu: Gpu | None, every_s: float = _EVERY_S) -> None:
        self._gpu, self._every_s, self.found = gpu, every_s, Watched()
        self._end = threading.Event()
        self._powers: list[tuple[float, float]] = []
        self._sm: list[int] = []
        self._memory: list[int] = []
        self._busy: list[int] = []
        self._nvdec: list[int] = []
        self._reasons: int | None = None

    def __enter__(self) -> Watch:
        if self._gpu is not None:
            self._before = self._gpu.energy_j()
            self._thread = threading.Thread(target=self._sample_until_end, name="nvml", daemon=True)
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._gpu is None:
            return
        self._end.set()
        self._thread.join()
        after = self._gpu.energy_j()
        counted = after - self._before if after is not None and self._before is not None else None
        self.found = Watched(
            joules=counted if counted is not None else integral(self._powers),
            sm_mhz=(min(self._sm), max(self._sm)) if self._sm else None,
            memory_mhz=(min(self._memory), max(self._memory)) if self._memory else None,
            throttled=None
            if self._reasons is None
            else [why for bit, why in _THROTTLED.items() if self._reasons & bit],
            sm_pct=_mean(self._busy),
            nvdec_pct=_mean(self._nvdec),
        )

    def _sample_until_end(self) -> None:
        while True:
            self._sample()
            if self._end.wait(self._every_s):
                return self._sample()

    def _sample(self) -> None:
        assert self._gpu is not None
        power, busy = self._gpu.power_w(), self._gpu.ask("nvmlDeviceGetUtilizationRates")
        decoder = self._gpu.ask("nvmlDeviceGetDecoderUtilization")
        if power is not None:
            self._powers.append((time.perf_counter(), power))
        for clock, kept in ((1, self._sm), (2, self._memory)):  # NVML_CLOCK_SM, NVML_CLOCK_MEM
            found = self._gpu.ask("nvmlDeviceGetClockInfo", clock)
            kept += [] if found is None else [found]
        self._busy += [] if busy is None else [busy.gpu]
        self._nvdec += [] if decoder is None else [decoder[0]]
        reasons = self._gpu.ask("nvmlDeviceGetCurrentClocksEventReasons")
        if reasons is None:  # its name in drivers before 535
            reasons = self._gpu.ask("nvmlDeviceGetCurrentClocksThrottleReasons")
        if reasons is not None:
            self._reasons = (self._reasons or 0) | reasons


def integral(powers: list[tuple[float, float]]) -> float | None:
    """Integrates samples of (seconds, watts) to joules by the trapezoid rule; None for fewer than two samples."""
    if len(powers) < 2:
        return None
    pairs = itertools.pairwise(powers)
    return sum((then - now) * (one + other) / 2 for (now, one), (then, other) in pairs)


def _mean(values: list[int]) -> float | None:
    return sum(values) / len(values) if values else None
