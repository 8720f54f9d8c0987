"""Measures every rank's device and the network between the ranks, and finds the slow and the broken ones."""

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
from fastav.distributed.host_group import HostGroup

SECONDS = 0.1
"""Duration of each measurement."""

MAX_RANKS_NAMED = 8
"""Ranks or faults that one message names."""

_GRACE_S = 10  # for a process to end by itself after one of its threads was left hanging

RatesByMeasure = dict[str, float]


def serious_faults(faults: Sequence[Fault], found: Sequence[RankMeasurement]) -> list[Fault]:
    """Faults but those of CPUs that are only slow: what they do depends on who else runs there."""
    cpus = {one.place.rank for one in found if one.place.device == "cpu"}
    return [fault for fault in faults if fault.kind == "broken" or not cpus.issuperset(fault.ranks)]


class Preflight:
    """Measures all ranks; every rank must make one, and run it.

    Each measurement runs in a thread that is waited for only so long, as no library call can be trusted to come back
    from a broken device or network. The ranks then meet over gloo, where one that does not come is found out.

    Args:
        host_group: The processes.
        device: Of this one.
        seconds: Of each measurement.
        patience_s: Within which each measurement must end, warm-up and connecting included.

    Attributes:
        places: Where every rank is, in rank order.
        nodes: The ranks of each node.
    """

    def __init__(self, host_group: HostGroup, device: torch.device, seconds: float, patience_s: float) -> None:
        self._host_group, self.device, self._seconds, self._patience_s = host_group, device, seconds, patience_s
        name, serial = device_tests.device_identity(device)
        where = str(device) if device.type == "cuda" else device.type  # accelerate numbers CPUs
        told = host_group.gather((node_of(os.environ), socket.gethostname(), where, name, serial))
        keys = list(dict.fromkeys(node for node, *_ in told))
        self.places = [RankPlace(rank, host, keys.index(node), *rest) for rank, (node, host, *rest) in enumerate(told)]
        self._check_kinds()
        self.nodes = [[one.rank for one in self.places if one.node == node] for node in range(len(keys))]
        self._rates: list[dict[str, float | None]] = [{} for _ in told]
        self._broken, self._hung = [""] * len(told), False

    def _check_kinds(self) -> None:
        """Refuses ranks without a GPU among others with one: they would not even measure the same.

        Raises:
            FastavError: Naming them.
        """
        without = [one for one in self.places if one.device == "cpu"]
        if 0 < len(without) < len(self.places):
            told = listed([one.describe() for one in without], MAX_RANKS_NAMED)
            raise FastavError(f"preflight: no GPU can be used by {told}; the other ranks have one")

    def run(self) -> list[RankMeasurement]:
        """Measures; stops after the first measure in which a rank is broken.

        Returns:
            What was found on every rank, in rank order, the same on each.

        Raises:
            FastavError: A rank does not answer at all; rank 0 names it.
        """
        try:
            if all(self._alone(*one) for one in self._local()):
                all(self._together(*one) for one in self._collective())
        finally:
            faulthandler.cancel_dump_traceback_later()
            if self._hung:  # a library that hangs may hang at the end of the process as well
                signal.signal(signal.SIGALRM, signal.SIG_DFL)
                signal.alarm(_GRACE_S)
        if self.device.type == "cuda" and not self._hung:
            with contextlib.suppress(Exception):  # of a broken device, which is yet to be told
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
        """Yields who is to measure what together: within the nodes, between them, and all."""
        yield "node", [ranks for ranks in self.nodes if len(ranks) > 1]
        for pairs in device_tests.pairings(len(self.nodes)):
            ends = [zip(self.nodes[a], self.nodes[b], strict=False) for a, b in pairs]  # ranks of the same local number
            yield "exchange", [sorted(pair) for one in ends for pair in one]
        yield "all", [list(range(self._host_group.world))] if len(self.nodes) > 1 else []

    def _everywhere(
        self, key: str, do: Callable[[], RatesByMeasure], *, together: bool = False
    ) -> list[RatesByMeasure]:
        """Does something on all ranks; returns what every one has found, and notes who is broken."""
        stuck_s = 3 * self._patience_s
        faulthandler.dump_traceback_later(stuck_s, exit=True, file=sys.__stderr__ or 2)  # if even this thread hangs
        what = MEASURES[key][0]
        waited = f"{what}: no end within {self._patience_s:g} s"
        outcome = self._within(what, do)
        self._hung |= outcome is None
        self._meet(what)
        every = self._host_group.gather(outcome or ({}, waited))
        self._broken = [why for _, why in every]
        if together and set(self._broken) - {"", waited}:  # who only waited for those that failed is not broken
            self._broken = [why if why != waited else "" for why in self._broken]
        return [rates for rates, _ in every]

    def _within(self, what: str, do: Callable[[], RatesByMeasure]) -> tuple[RatesByMeasure, str] | None:
        """Does something in a thread; returns what it found, and why it failed; None where it has not come back."""
        done: list[tuple[RatesByMeasure, str]] = []

        def work() -> None:
            try:
                if self.device.type == "cuda":
                    torch.cuda.set_device(self.device)  # each thread has its own
                done.append((do(), ""))
            except Exception as error:  # whatever a broken device raises
                done.append(({}, f"{what}: {reason_of(error)[:500]}"))

        thread = threading.Thread(target=work, name="preflight", daemon=True)
        thread.start()
        thread.join(self._patience_s)
        return done[0] if done else None

    def _meet(self, what: str) -> None:
        """Waits for all ranks.

        Raises:
            FastavError: Some do not come.
        """
        if self._host_group.world == 1:
            return
        wait_s = 1.5 * self._patience_s  # others may have waited for their own thread
        try:
            dist.monitored_barrier(self._host_group.group, timedelta(seconds=wait_s), wait_all_ranks=True)
        except RuntimeError as error:
            missing = re.search(r"Ranks? ([\d, ]+?) (?:failed to pass|timed out in) monitoredBarrier", str(error))
            if self._host_group.rank == 0 and missing:
                who = [self.places[int(rank)].describe() for rank in missing[1].split(",")]
                told = f"{listed(who, MAX_RANKS_NAMED)} did not answer within {wait_s:g} s"
            else:
                told = f"not all ranks answered within {wait_s:g} s, rank 0 names them: {reason_of(error)[:200]}"
            raise FastavError(f"preflight: {what}: {told}") from None

    def _alone(self, key: str, do: Callable[[], RatesByMeasure]) -> bool:
        """Measures something on every rank by itself; returns whether nobody is broken."""
        self._note(key, self._everywhere(key, do), [[place.rank] for place in self.places])
        return not any(self._broken)

    def _note(self, key: str, found: Sequence[RatesByMeasure], teams: Sequence[Sequence[int]]) -> None:
        """Keeps what was measured: a team is as fast as its slowest rank says."""
        for team in teams:
            rates = [found[rank][key] for rank in team if key in found[rank]]
            for rank in team if rates else ():
                # Of several exchanges the best counts: a slow partner is not one's own fault.
                self._rates[rank][key] = max(min(rates), self._rates[rank].get(key) or 0.0)

    def _together(self, key: str, teams: list[list[int]]) -> bool:
        """Measures something among the ranks of each team; returns whether nobody is broken."""
        if not teams:
            return True
        world, rank, calls = self._host_group.world, self._host_group.rank, device_tests.SAMPLES
        team = next((team for team in teams if rank in team), [])
        kept: list[device_tests.Collective] = []

        def begin() -> RatesByMeasure:
            limit = timedelta(seconds=4 * self._patience_s)  # gloo's threads must not outlive the preflight for long
            # Every rank makes all groups, in the same order; the one of all ranks is there.
            groups = [None if len(one) == world else dist.new_group(one, timeout=limit) for one in teams]
            if not team:
                return {}
            make = device_tests.Exchange if key == "exchange" else device_tests.AllReduce
            collective = make(team, groups[teams.index(team)], rank, self.device)
            kept.append(collective)
            collective.run()
            once_s = device_tests.elapsed_s(self.device, collective.run)
            collective.check()  # last: whoever finds fault leaves nobody waiting
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
        slowest_s = max(found.get("once_s", 0.0) for found in first)  # all must call equally often
        calls = int(self._seconds / max(slowest_s, 1e-9))
        self._note(key, self._everywhere(key, measure, together=True), teams)
        return not any(self._broken)


def node_of(environment: Mapping[str, str]) -> str:
    """Tells nodes apart: torchrun's number, SLURM's for ranks that srun started, or else the host's name."""
    if "TORCHELASTIC_RUN_ID" in environment and "GROUP_RANK" in environment:
        return environment["GROUP_RANK"]
    if "SLURM_NODEID" in environment and environment.get("SLURM_PROCID") == environment.get("RANK"):
        return environment["SLURM_NODEID"]
    return socket.gethostname()
