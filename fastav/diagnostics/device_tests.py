"""Short speed tests of a device and of the network between ranks; each also checks its results.

All inputs are integers small enough for every sum to be exact in any order. The correct result is therefore known to
the bit, whatever library and device computes it.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from fastav.core.errors import FastavError

SAMPLES = 5  # samples whose median is the rate
_MOST_CALLS = 1000  # per sample
# By kind of device: the side of the matrices, and the bytes that are copied and sent.
_SIDE = {"cuda": 8192, "mps": 2048, "cpu": 512}
_COPIED = {"cuda": 1 << 29, "mps": 1 << 27, "cpu": 1 << 25}
_SENT = {"cuda": 1 << 28, "mps": 1 << 24, "cpu": 1 << 22}
_FROM_HOST = 1 << 26
_WARM_S = {"cuda": 1.0}  # shortest duration of the matrix product: thermal and power limits show only then
_PERIOD = 251  # the numbers that are copied and sent are 0 to 250, repeated
_LARGEST = 8  # largest number in the matrices: the sum of 8192 products is below 2**24, exact in float32
_ROWS, _COLUMNS = 16, 256  # of a product that are recomputed on the CPU


def matmul_rate(device: torch.device, seconds: float) -> float:
    """Measures a matrix product, bf16 on a GPU and fp32 elsewhere, and returns its rate in TFLOP/s.

    Some rows are compared with float64 on the CPU. The whole result is compared with that of shifted rows, which other
    parts of the GPU compute, and with the result at the end, when the device is warm.

    Args:
        device: Device to test.
        seconds: Duration of the measurement; on a GPU at least one second.

    Raises:
        FastavError: The product is wrong.
    """
    side, dtype = _SIDE[device.type], torch.bfloat16 if device.type == "cuda" else torch.float32
    draw = torch.Generator(device).manual_seed(0)
    a, b = (
        torch.randint(-_LARGEST, _LARGEST + 1, (side, side), generator=draw, device=device, dtype=dtype)
        for _ in range(2)
    )
    settings = torch.backends.cuda.matmul
    kept = settings.allow_bf16_reduced_precision_reduction
    settings.allow_bf16_reduced_precision_reduction = False  # it would round partial sums
    try:
        first = torch.mm(a, b)
        rows = torch.arange(0, side, side // _ROWS, device=device)
        columns = torch.arange(0, side, side // _COLUMNS, device=device)
        expected = (a[rows].cpu().double() @ b[:, columns].cpu().double()).to(dtype)
        _raise_if_any(first[rows][:, columns].cpu() != expected, "numbers differ from the float64 result")
        moved = torch.mm(a.roll(side // 2, 0), b).roll(-(side // 2), 0)
        _raise_if_any(moved != first, "numbers differ when they are computed in other rows")
        last = torch.empty_like(first)
        seconds = max(seconds, _WARM_S.get(device.type, 0.0))
        rate = 2 * side**3 / _warm_median_s(device, lambda: torch.mm(a, b, out=last), seconds) / 1e12
        _raise_if_any(last != first, "numbers differ when they are computed again")
    finally:
        settings.allow_bf16_reduced_precision_reduction = kept
    return rate


def copy_rate(device: torch.device, seconds: float) -> float:
    """Measures a copy within the device's memory and returns its rate in GB/s, read plus written bytes.

    Raises:
        FastavError: The copy differs.
    """
    source = _whole_numbers(_COPIED[device.type] // 4, device)
    target = torch.zeros_like(source)
    rate = 2 * source.nbytes / _warm_median_s(device, lambda: target.copy_(source), seconds) / 1e9
    _raise_if_any(target != source, "copied numbers differ")
    return rate


def host_to_device_rate(device: torch.device, seconds: float) -> float:
    """Measures a copy from pinned host memory to the device and returns its rate in GB/s.

    All ranks of a node copy at the same time.

    Raises:
        FastavError: The copy differs.
    """
    source = _whole_numbers(_FROM_HOST // 4, torch.device("cpu")).pin_memory()
    target = torch.zeros(source.shape, device=device)
    rate = source.nbytes / _warm_median_s(device, lambda: target.copy_(source, non_blocking=True), seconds) / 1e9
    _raise_if_any(target.cpu() != source, "copied numbers differ")
    return rate


class AllReduce:
    """An all-reduce over some ranks whose correct result is known.

    Args:
        team: The ranks that take part.
        group: Process group of these ranks; None for the group of all ranks.
        rank: Rank of this process.
        device: Device of the tensors.

    Attributes:
        num_bytes: Bytes that each rank sends and receives in a ring: 2 (n - 1) / n of the tensor. Divided by the time,
            this is the bus bandwidth as NCCL's tests define it (nccl-tests, doc/PERFORMANCE.md).
    """

    def __init__(self, team: Sequence[int], group: Any, rank: int, device: torch.device) -> None:
        self.group, self._count, self._place = group, len(team), team.index(rank)
        self._values = _whole_numbers(_SENT[device.type] // 4, device)
        self._buffer = torch.zeros_like(self._values)
        self.num_bytes = 2 * (self._count - 1) / self._count * self._values.nbytes

    def run(self) -> None:
        """Sums zeros, so that the buffer can be reused any number of times."""
        dist.all_reduce(self._buffer, group=self.group)

    def check(self) -> None:
        """Sums known numbers and checks the result.

        Raises:
            FastavError: Some sums are wrong.
        """
        self._buffer.copy_(self._values).add_(self._place)
        self.run()
        wrong = self._buffer != self._values * self._count + self._count * (self._count - 1) / 2
        _raise_if_any(wrong, f"sums over {self._count} ranks are wrong")
        self._buffer.zero_()


class Exchange:
    """Two ranks send each other a tensor at the same time.

    Args:
        team: The two ranks.
        group: Process group of these ranks; None for the group of all ranks.
        rank: Rank of this process.
        device: Device of the tensors.

    Attributes:
        num_bytes: Bytes sent in each direction.
    """

    def __init__(self, team: Sequence[int], group: Any, rank: int, device: torch.device) -> None:
        self.group, self._partner = group, team[1 - team.index(rank)]
        values = _whole_numbers(_SENT[device.type] // 4, device)
        self._sent, self._expected, self._received = values + rank, values + self._partner, torch.zeros_like(values)
        self.num_bytes = values.nbytes

    def run(self) -> None:
        """Sends and receives."""
        sending = dist.P2POp(dist.isend, self._sent, self._partner, self.group)
        receiving = dist.P2POp(dist.irecv, self._received, self._partner, self.group)
        for work in dist.batch_isend_irecv([sending, receiving]):
            work.wait()

    def check(self) -> None:
        """Sends and receives known numbers and checks the received ones.

        Raises:
            FastavError: They differ from what the partner sent.
        """
        self._received.zero_()
        self.run()
        wrong = self._received != self._expected
        _raise_if_any(wrong, f"numbers received from rank {self._partner} differ from those it sent")


Collective = AllReduce | Exchange


def device_identity(device: torch.device) -> tuple[str, str]:
    """Returns name and UUID of a device (or else its PCI bus), as in `nvidia-smi -L`; the UUID of a CPU is empty."""
    if device.type != "cuda":
        return device.type.upper(), ""
    properties = torch.cuda.get_device_properties(device)
    uuid, bus = getattr(properties, "uuid", ""), getattr(properties, "pci_bus_id", None)
    return properties.name, f"GPU-{uuid}" if uuid else f"PCI bus {bus}" if bus is not None else ""


def pairings(num_nodes: int) -> Iterator[list[tuple[int, int]]]:
    """Yields rounds of disjoint pairs of neighbouring nodes on a ring.

    With three or more nodes, each node has two different partners. Both neighbours of a bad node therefore also have a
    good partner.
    """
    if num_nodes < 2:
        return
    yield [(node, node + 1) for node in range(0, num_nodes - 1, 2)]
    if num_nodes > 2:
        ring = [(node, (node + 1) % num_nodes) for node in range(1, num_nodes, 2)]
        yield [pair for pair in ring if num_nodes % 2 == 0 or pair[1]]
    if num_nodes > 2 and num_nodes % 2:
        yield [(num_nodes - 1, 0)]


def elapsed_s(device: torch.device, do: Callable[[], object], calls: int = 1) -> float:
    """Returns the seconds that `calls` calls take, including the device's work."""
    _synchronize(device)
    start_s = time.perf_counter()
    for _ in range(calls):
        do()
    _synchronize(device)
    return max(time.perf_counter() - start_s, 1e-9)


def median_s(device: torch.device, do: Callable[[], object], calls: int) -> float:
    """Returns the seconds per call: the median of `SAMPLES` samples, which together make about `calls` calls."""
    each = min(_MOST_CALLS, max(1, calls // SAMPLES))
    return statistics.median(elapsed_s(device, do, each) for _ in range(SAMPLES)) / each


def _warm_median_s(device: torch.device, do: Callable[[], object], seconds: float) -> float:
    """Returns the seconds per call after a warm-up; measures for about `seconds`."""
    do()
    return median_s(device, do, int(seconds / elapsed_s(device, do)))


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def _whole_numbers(count: int, device: torch.device) -> Tensor:
    return torch.arange(_PERIOD, device=device, dtype=torch.float32).repeat(count // _PERIOD + 1)[:count]


def _raise_if_any(wrong: Tensor, what: str) -> None:
    """Raises a FastavError if any element is true."""
    count = int(wrong.sum())
    if count:
        raise FastavError(f"{count} of {wrong.numel()} {what}")
