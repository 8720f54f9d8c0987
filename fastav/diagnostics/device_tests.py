"""Gauges: short measurements of a device and of what is between ranks; each one checks what it has computed or moved.

All that is computed with is whole numbers that are small enough for every sum to be exact, in any order: the result is
known to the bit, whatever library and device computed it.
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

SAMPLES = 5  # a rate is the median of so many
_MOST_CALLS = 1000  # of one sample
# By kind of device: the side of the matrices, and bytes of what is copied and sent.
_SIDE = {"cuda": 8192, "mps": 2048, "cpu": 512}
_COPIED = {"cuda": 1 << 29, "mps": 1 << 27, "cpu": 1 << 25}
_SENT = {"cuda": 1 << 28, "mps": 1 << 24, "cpu": 1 << 22}
_FROM_HOST = 1 << 26
_WARM_S = {"cuda": 1.0}  # of the product: heat and limits of power show only then
_PERIOD = 251  # the numbers that are copied and sent are 0 to 250, over and over
_LARGEST = 8  # number in the matrices; 8192 products of two are below 2**24, float32 holds them
_ROWS, _COLUMNS = 16, 256  # of a product that are computed again on the CPU


def matmul_rate(device: torch.device, seconds: float) -> float:
    """A matrix product, bf16 on a GPU and fp32 elsewhere; returns TFLOP/s.

    Some rows are compared with float64 on the CPU; the whole with itself repeated, with the rows computed in another
    place (by other parts of the GPU), and with what came out at the end, when the device is warm.

    Args:
        device: Where.
        seconds: To measure for; a second at least on a GPU.

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
        _refuse(first[rows][:, columns].cpu() != expected, "numbers are not those of float64")
        moved = torch.mm(a.roll(side // 2, 0), b).roll(-(side // 2), 0)
        _refuse(moved != first, "numbers change with the place where they are computed")
        last = torch.empty_like(first)
        seconds = max(seconds, _WARM_S.get(device.type, 0.0))
        rate = 2 * side**3 / _pace(device, lambda: torch.mm(a, b, out=last), seconds) / 1e12
        _refuse(last != first, "numbers change when they are computed again")
    finally:
        settings.allow_bf16_reduced_precision_reduction = kept
    return rate


def copy_rate(device: torch.device, seconds: float) -> float:
    """A copy within the device's memory; returns GB/s, read and written bytes together.

    Raises:
        FastavError: The copy differs.
    """
    source = _whole_numbers(_COPIED[device.type] // 4, device)
    target = torch.zeros_like(source)
    rate = 2 * source.nbytes / _pace(device, lambda: target.copy_(source), seconds) / 1e9
    _refuse(target != source, "copied numbers differ")
    return rate


def host_to_device_rate(device: torch.device, seconds: float) -> float:
    """A copy from page-locked memory of the host to the device; returns GB/s. All ranks of a node copy at once.

    Raises:
        FastavError: The copy differs.
    """
    source = _whole_numbers(_FROM_HOST // 4, torch.device("cpu")).pin_memory()
    target = torch.zeros(source.shape, device=device)
    rate = source.nbytes / _pace(device, lambda: target.copy_(source, non_blocking=True), seconds) / 1e9
    _refuse(target.cpu() != source, "copied numbers differ")
    return rate


class AllReduce:
    """A sum over the ranks of a team, of which every number is known.

    Args:
        team: Ranks.
        group: Their process group; None is that of all ranks.
        rank: This one.
        device: Where the numbers are.

    Attributes:
        num_bytes: That a rank sends and receives in a ring: 2 (n - 1) / n of the tensor. Divided by the time it is
            the bus bandwidth of NCCL's own tests (nccl-tests, doc/PERFORMANCE.md).
    """

    def __init__(self, team: Sequence[int], group: Any, rank: int, device: torch.device) -> None:
        self.group, self._count, self._place = group, len(team), team.index(rank)
        self._values = _whole_numbers(_SENT[device.type] // 4, device)
        self._buffer = torch.zeros_like(self._values)
        self.num_bytes = 2 * (self._count - 1) / self._count * self._values.nbytes

    def run(self) -> None:
        """Sums zeros, which stay zeros however often they are summed."""
        dist.all_reduce(self._buffer, group=self.group)

    def check(self) -> None:
        """Sums numbers.

        Raises:
            FastavError: Some sums are wrong.
        """
        self._buffer.copy_(self._values).add_(self._place)
        self.run()
        wrong = self._buffer != self._values * self._count + self._count * (self._count - 1) / 2
        _refuse(wrong, f"sums over {self._count} ranks are wrong")
        self._buffer.zero_()


class Exchange:
    """Two ranks send each other a tensor at the same time.

    Args:
        team: The two.
        group: As of `AllReduce`.
        rank: This one.
        device: Where the tensors are.

    Attributes:
        num_bytes: That go each way.
    """

    def __init__(self, team: Sequence[int], group: Any, rank: int, device: torch.device) -> None:
        self.group, self._partner = group, team[1 - team.index(rank)]
        values = _whole_numbers(_SENT[device.type] // 4, device)
        self._sent, self._wanted, self._got = values + rank, values + self._partner, torch.zeros_like(values)
        self.num_bytes = values.nbytes

    def run(self) -> None:
        """Sends and receives."""
        sending = dist.P2POp(dist.isend, self._sent, self._partner, self.group)
        receiving = dist.P2POp(dist.irecv, self._got, self._partner, self.group)
        for work in dist.batch_isend_irecv([sending, receiving]):
            work.wait()

    def check(self) -> None:
        """Sends and receives, and looks at what has come.

        Raises:
            FastavError: It is not what the partner sent.
        """
        self._got.zero_()
        self.run()
        _refuse(self._got != self._wanted, f"numbers from rank {self._partner} are not those it sent")


Collective = AllReduce | Exchange


def device_identity(device: torch.device) -> tuple[str, str]:
    """Name and serial of a device: its UUID, as `nvidia-smi -L` shows it, or where it sits; empty on a CPU."""
    if device.type != "cuda":
        return device.type.upper(), ""
    told = torch.cuda.get_device_properties(device)
    uuid, bus = getattr(told, "uuid", ""), getattr(told, "pci_bus_id", None)
    return told.name, f"GPU-{uuid}" if uuid else f"PCI bus {bus}" if bus is not None else ""


def pairings(num_nodes: int) -> Iterator[list[tuple[int, int]]]:
    """Yields rounds of disjoint pairs of nodes, in which each node has two different partners where there are three.

    They are the neighbours on a ring. Of one bad node both neighbours have one good partner left.
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
    """Seconds that so many calls take, until the device has done them."""
    _synchronize(device)
    begun = time.perf_counter()
    for _ in range(calls):
        do()
    _synchronize(device)
    return max(time.perf_counter() - begun, 1e-9)


def median_s(device: torch.device, do: Callable[[], object], calls: int) -> float:
    """Seconds of a call: the median of `SAMPLES` samples that share the calls."""
    each = min(_MOST_CALLS, max(1, calls // SAMPLES))
    return statistics.median(elapsed_s(device, do, each) for _ in range(SAMPLES)) / each


def _pace(device: torch.device, do: Callable[[], object], seconds: float) -> float:
    """Seconds of a call, after a warm-up, measured for so long."""
    do()
    return median_s(device, do, int(seconds / elapsed_s(device, do)))


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def _whole_numbers(count: int, device: torch.device) -> Tensor:
    return torch.arange(_PERIOD, device=device, dtype=torch.float32).repeat(count // _PERIOD + 1)[:count]


def _refuse(wrong: Tensor, what: str) -> None:
    """Ends where any element is wrong."""
    count = int(wrong.sum())
    if count:
        raise FastavError(f"{count} of {wrong.numel()} {what}")
