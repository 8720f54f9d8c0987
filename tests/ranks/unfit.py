"""Run by torchrun on two ranks: preflights in which rank 1 is not fit, one after the other; a line of JSON each."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
import time
from unittest.mock import patch

import torch
import torch.distributed as dist

from fastav.core.errors import FastavError
from fastav.diagnostics.rank_check import Preflight
from fastav.diagnostics.rank_verdicts import find_faults
from fastav.distributed.gloo_group import GlooGroup

PATIENCE_S = 5.0
multiply, reduce = torch.mm, dist.all_reduce


def wrong_product(a, b, out=None):
    """One number in a quarter of a million, in a row that is not compared with float64."""
    result = multiply(a, b, out=out)
    result[5, 7] += 1
    return result


def failing_product(a, b, out=None):
    raise RuntimeError("CUDA error: an illegal memory access was encountered")


def late_product(a, b, out=None):
    time.sleep(4 * PATIENCE_S)
    return multiply(a, b, out=out)


def gone_product(a, b, out=None):
    os.kill(os.getpid(), signal.SIGSTOP)
    return multiply(a, b, out=out)


def wrong_sum(tensor, group=None):
    reduce(tensor, group=group)
    tensor[-1] += 1


def failing_sum(tensor, group=None):
    raise RuntimeError("NCCL error: unhandled system error")


CASES = {
    "well": contextlib.nullcontext(),
    "wrong product": patch("torch.mm", wrong_product),
    "failing product": patch("torch.mm", failing_product),
    "wrong sum": patch("torch.distributed.all_reduce", wrong_sum),
    "late": patch("torch.mm", late_product),
    "failing sum": patch("torch.distributed.all_reduce", failing_sum),
    "gone": patch("torch.mm", gone_product),
}


def run(case, gloo_group):
    """What the preflight says of a case, on this rank."""
    patience_s = PATIENCE_S if case in ("late", "failing sum", "gone") else 60.0
    preflight = Preflight(gloo_group, torch.device("cpu"), 0.01, patience_s)
    begun = time.monotonic()
    try:
        with CASES[case] if gloo_group.rank == 1 else contextlib.nullcontext():
            found = preflight.run()
        told = [fault.text for fault in find_faults(found, 0.0)]
    except FastavError as error:
        found, told = [], [str(error)]
    signal.alarm(0)  # a thread was left behind on purpose
    took_s = time.monotonic() - begun
    return {"case": case, "told": told, "rates": [dict(one.rates) for one in found], "took_s": took_s}


if __name__ == "__main__":
    dist.init_process_group("gloo")
    torch.set_num_threads(1)
    gloo_group = GlooGroup(dist.get_rank(), 2, dist.new_group(backend="gloo"))
    processes = gloo_group.gather(os.getpid())
    for case in sys.argv[1:]:
        line = json.dumps(run(case, gloo_group))
        if gloo_group.rank == 0:
            print("FOUND", line, flush=True)
    if gloo_group.rank == 0 and "gone" in sys.argv:
        os.kill(processes[1], signal.SIGKILL)
    os._exit(0)
