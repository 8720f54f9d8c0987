"""Tests every rank's device and the network between the ranks, to find slow and broken ones."""

from __future__ import annotations

import contextlib
import faulthandler
import os
import re
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import timedelta

import torch
import torch.distributed as dist

from fastav.core.errors import FastavError, listed, reason_of
from fastav.diagnostics import device_tests
from fastav.diagnostics.rank_verdicts import MEASURES, Fault, RankMeasurement, RankPlace
from fastav.distributed.gloo_group import GlooGroup

SECONDS = 0.1
"""Duration of each measurement, seconds."""

MAX_RANKS_NAMED = 8
"""Largest number of ranks or faults named in one message."""

_GRACE_S = 10  # time for a process to end by itself when one of its threads hangs

RatesByMeasure = dict[str, float]


def serious_faults(faults: Sequence[Fault], found: Sequence[RankMeasurement]) -> list[Fault]:
    """Returns the faults, without those of CPUs that are only slow: their speed depends on other programs."""
    cpus = {one.place.rank for one in found if one.place.device == "cpu"}
    return [fault for fault in faults if fault.kind == "broken" or not cpus.issuperset(fault.ranks)]


class Preflight:
    """Tests all ranks; every rank must create and run one.

    Each measurement runs in a thread with a timeout, because a library call may never return from a broken device or
    network. The ranks then meet at a barrier over gloo, which detects those that do not arrive.

    Args:
        gloo_group: Group of all processes.
        device: Device of this process.
        seconds: Duration of each measurement.
        patience_s: Timeout of each measurement in seconds, including warm-up and connecting.

    Attributes:
        places: Host, node and device of every rank, in rank order.
        nodes: Ranks of each node.
        device: Device of this process.
    """

    def __init__(self, gloo_group: GlooGroup, device: torch.device, seconds: float, patience_s: float) -> None:
        self._gloo_group, self.device, self._seconds, self._patience_s = gloo_group, device, seconds, patience_s
        name, serial = device_tests.device_identity(device)
        where = str(device) if device.type == "cuda" else device.type  # accelerate numbers CPUs
        all_ranks = gloo_group.gather((node_of(os.environ), socket.gethostname(), where, name, serial))
        keys = list(dict.fromkeys(node for node, *_ in all_ranks))
        self.places = [
            RankPlace(rank, host, keys.index(node), *rest) for rank, (node, host, *rest) in enumerate(all_ranks)
        ]
        self._check_kinds()
        self.nodes = [[one.rank for one in self.places if one.node == node] for node in range(len(keys))]
        self._rates: list[dict[str, float | None]] = [{} for _ in all_ranks]
        self._broken, self._hung = [""] * len(all_ranks), False

    def _check_kinds(self) -> None:
        """Checks that either all ranks have a GPU or none has: others would not run the same measurements.

        Raises:
            FastavError: Some ranks have no GPU; the message names them.
        """
        without = [one for one in self.places if one.device == "cpu"]
        if 0 < len(without) < len(self.places):
            names = listed([one.describe() for one in without], MAX_RANKS_NAMED)
            raise FastavError(f"preflight: no usable GPU on {names}; the other ranks have one")

    def run(self) -> list[RankMeasurement]:
        """Runs all measurements; stops after the first one in which a rank is broken.

        Returns:
            The measurements of every rank, in rank order; the same list on each rank.

        Raises:
            FastavError: A rank does not answer; the message on rank 0 names it.
        """
        try:
            if all(self._alone(*one) for one in self._local()):
                all(self._together(*one) for one in self._collective())
        finally:
            faulthandler.cancel_dump_traceback_later()
            if self._hung:  # a library that hangs may also hang when the process ends
                signal.signal(signal.SIGALRM, signal.SIG_DFL)
                signal.alarm(_GRACE_S)
        if self.device.type == "cuda" and not self._hung:
            with contextlib.suppress(Exception):  # of a broken device, which is reported later
                torch.cuda.empty_cache()
        facts = zip(self.places, self._rates, self._broken, strict=True)
        return [RankMeasurement(place, rates, broken) for place, rates, broken in facts]

    def _local(self) -> Iterator[tuple[str, Callable[[], RatesByMeasure]]]:
        measures = {
            "product": device_tests.matmul_rate,
            "copy": device_tests.copy_rate,
            "host": device_tests.host_to_device_rate,
        }
        for key in measures if self.device.type == "cuda" else ("product", "copy"):
            yield key, lambda do=measures[key], key=key: {key: do(self.device, self._seconds)}  # type: ignore[misc]

    def _collective(self) -> Iterator[tuple[str, list[list[int]]]]:
        """Yields each collective measurement with its teams of ranks: within nodes, between nodes, and all ranks."""
        yield "node", [ranks for ranks in self.nodes if len(ranks) > 1]
        for pairs in device_tests.pairings(len(self.nodes)):
            ends = [zip(self.nodes[a], self.nodes[b], strict=False) for a, b in pairs]  # ranks of the same local number
            yield "exchange", [sorted(pair) for one in ends for pair in one]
        yield "all", [list(range(self._gloo_group.world))] if len(self.nodes) > 1 else []

    def _everywhere(
        self, key: str, do: Callable[[], RatesByMeasure], *, together: bool = False
    ) -> list[RatesByMeasure]:
        """Runs a measurement on all ranks; returns the result of each, and records which ranks are broken."""
        stuck_s = 3 * self._patience_s
        faulthandler.dump_traceback_later(stuck_s, exit=True, file=sys.__stderr__ or 2)  # if even this thread hangs
        what = MEASURES[key][0]
        timeout = f"{what}: timed out after {self._patience_s:g} s"
        outcome = self._run_with_timeout(what, do)
        self._hung |= outcome is None
        self._barrier(what)
        every = self._gloo_group.gather(outcome or ({}, timeout))
        self._broken = [why for _, why in every]
        if together and set(self._broken) - {"", timeout}:  # ranks that only waited for a failed one are not broken
            self._broken = [why if why != timeout else "" for why in self._broken]
        return [rates for rates, _ in every]

    def _run_with_timeout(self, what: str, do: Callable[[], RatesByMeasure]) -> tuple[RatesByMeasure, str] | None:
        """Runs a measurement in a thread; returns its rates and its error, or None if it has not returned in time."""
        done: list[tuple[RatesByMeasure, str]] = []

        def work() -> None:
            try:
                if self.device.type == "cuda":
                    torch.cuda.set_device(self.device)  # the current device is set per thread
                done.append((do(), ""))
            except Exception as error:  # a broken device can raise any type
                done.append(({}, f"{what}: {reason_of(error)[:500]}"))

        thread = threading.Thread(target=work, name="preflight", daemon=True)
        thread.start()
        thread.join(self._patience_s)
        return done[0] if done else None

    def _barrier(self, what: str) -> None:
        """Waits for all ranks.

        Raises:
            FastavError: Some ranks do not arrive.
        """
        if self._gloo_group.world == 1:
            return
        wait_s = 1.5 * self._patience_s  # other ranks may still be waiting for their own thread
        try:
            dist.monitored_barrier(self._gloo_group.group, timedelta(seconds=wait_s), wait_all_ranks=True)
        except RuntimeError as error:
            missing = re.search(r"Ranks? ([\d, ]+?) (?:failed to pass|timed out in) monitoredBarrier", str(error))
            if self._gloo_group.rank == 0 and missing:
                names = [self.places[int(rank)].describe() for rank in missing[1].split(",")]
                text = f"{listed(names, MAX_RANKS_NAMED)} did not answer within {wait_s:g} s"
            else:
                text = f"not all ranks answered within {wait_s:g} s; see the error of rank 0: {reason_of(error)[:200]}"
            raise FastavError(f"preflight: {what}: {text}") from None

    def _alone(self, key: str, do: Callable[[], RatesByMeasure]) -> bool:
        """Measures every rank on its own; returns whether no rank is broken."""
        self._record(key, self._everywhere(key, do), [[place.rank] for place in self.places])
        return not any(self._broken)

    def _record(self, key: str, found: Sequence[RatesByMeasure], teams: Sequence[Sequence[int]]) -> None:
        """Stores the rates of a measurement; each rank of a team gets the rate of its slowest rank."""
        for team in teams:
            rates = [found[rank][key] for rank in team if key in found[rank]]
            for rank in team if rates else ():
                # Of several exchanges the fastest counts: a slow one may be the partner's fault.
                self._rates[rank][key] = max(min(rates), self._rates[rank].get(key) or 0.0)

    def _together(self, key: str, teams: list[list[int]]) -> bool:
        """Measures the ranks of each team together; returns whether no rank is broken."""
        if not teams:
            return True
        world, rank, calls = self._gloo_group.world, self._gloo_group.rank, device_tests.SAMPLES
        team = next((team for team in teams if rank in team), [])
        kept: list[device_tests.Collective] = []

        def begin() -> RatesByMeasure:
            limit = timedelta(seconds=4 * self._patience_s)  # gloo's threads must end soon after the preflight
            # Every rank creates all groups, in the same order; the group of all ranks already exists.
            groups = [None if len(one) == world else dist.new_group(one, timeout=limit) for one in teams]
            if not team:
                return {}
            make = device_tests.Exchange if key == "exchange" else device_tests.AllReduce
            collective = make(team, groups[teams.index(team)], rank, self.device)
            kept.append(collective)
            collective.run()
            once_s = device_tests.elapsed_s(self.device, collective.run)
            collective.check()  # last: no rank waits for one whose check fails
            return {"once_s": once_s}

        def measure() -> RatesByMeasure:
            if not team:
                return {}
            (collective,) = kept
            rate = collective.num_bytes / device_tests.median_s(self.device, collective.run, calls) / 1e9
            collective.check()
            if collective.group is not None:
                dist.destroy_process_group(collective.group)
            return {key: rate}

        first = self._everywhere(key, begin, together=True)
        if any(self._broken):
            return False
        slowest_s = max(found.get("once_s", 0.0) for found in first)  # all ranks must make the same number of calls
        calls = int(self._seconds / max(slowest_s, 1e-9))
        self._record(key, self._everywhere(key, measure, together=True), teams)
        return not any(self._broken)


def node_of(environment: Mapping[str, str]) -> str:
    """Returns an identifier of this node: torchrun's group rank, SLURM's node number under srun, or the host name."""
    if "TORCHELASTIC_RUN_ID" in environment and "GROUP_RANK" in environment:
        return environment["GROUP_RANK"]
    if "SLURM_NODEID" in environment and environment.get("SLURM_PROCID") == environment.get("RANK"):
        return environment["SLURM_NODEID"]
    return socket.gethostname()
