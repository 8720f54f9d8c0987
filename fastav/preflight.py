"""Preflight: a short product, copy and all-reduce on every rank; a slow or broken one is named before hours are lost.

fastav preflight                             this machine's first device
torchrun ... -m fastav.preflight             the ranks that it starts; accelerate launch does as well
"""

from __future__ import annotations

import argparse
import contextlib
import faulthandler
import json
import os
import re
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from fastav import gauges
from fastav.commandline import run as run_verb
from fastav.crew import Crew, reason_of
from fastav.errors import FastavError, UserError, listed
from fastav.files import write_text
from fastav.guard import Guarding
from fastav.measured import MEASURES, Fault, Measured, Place, judge, summary, table
from fastav.meter import Console
from fastav.ranks import Ranks, leave
from fastav.recipe import Training
from fastav.run import RunFolder

SECONDS, PATIENCE_S = 0.1, Guarding().preflight_patience_s
_SHOWN = 8
_GRACE_S = 10  # for a process to end by itself after one of its threads was left hanging

Rates = dict[str, float]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the verb's options."""
    parser.add_argument("--seconds", type=float, default=SECONDS, help=f"of each measurement ({SECONDS:g})")
    parser.add_argument("--slow", type=float, default=Guarding().slow_device,
                        help="a rank is slow with less than this share of the median (%(default)s)")  # fmt: skip
    parser.add_argument("--patience", type=float, default=PATIENCE_S,
                        help="seconds within which a measurement must end (%(default)s)")  # fmt: skip
    parser.add_argument("--json", type=Path, help="write everything to this file")


def main(args: argparse.Namespace) -> int:
    """Measures, prints a line for each rank and each fault; 1 where a rank is broken, or slow other than on a CPU."""
    for name in ("seconds", "patience"):
        if not getattr(args, name) > 0:
            raise UserError(f"--{name} {getattr(args, name):g}: more than 0 expected")
    if not 0 <= args.slow <= 1:
        raise UserError(f"--slow {args.slow:g}: a share from 0 to 1 expected")
    # A launcher's config that names a precision is as good as any: nothing is trained.
    bf16 = os.environ.get("ACCELERATE_MIXED_PRECISION") == "bf16"
    try:
        ranks = Ranks(Training(precision="bf16" if bf16 else "fp32"))
        found = Preflight(ranks.crew, ranks.device, args.seconds, args.patience).run()
        faults, console = judge(found, args.slow), Console(sys.stdout, quiet=not ranks.main)
        for one in found:
            console.log(one.tell())
        for fault in faults:
            console.log(f"slow: {fault.text}" if fault.kind == "slow" else fault.text)
        console.log(summary(found, faults, args.slow))
        if args.json and ranks.main:
            write_text(args.json, json.dumps(table(found, faults), indent=1))
    finally:
        with contextlib.suppress(RuntimeError):  # of a broken device, which has been told
            leave()
    return int(bool(_serious(faults, found)))


def before_training(ranks: Ranks, guarding: Guarding, run: RunFolder, console: Console, step: int = 0) -> None:
    """Measures at the start of a run, where the recipe says so; every rank must call it.

    Args:
        ranks: The processes.
        guarding: Says whether, and what becomes of slow ranks.
        run: Where figures (`logs/preflight.json`) and incidents go.
        console: Of the main rank.
        step: At which the run goes on.

    Raises:
        FastavError: A rank is broken or does not answer, or is slow and the recipe ends the run there.
    """
    if guarding.preflight == "never" or (guarding.preflight == "auto" and ranks.world == 1):
        return
    preflight = Preflight(ranks.crew, ranks.device, SECONDS, guarding.preflight_patience_s)
    if guarding.preflight == "auto" and len(preflight.nodes) == 1:
        return
    found = preflight.run()
    faults = judge(found, guarding.slow_device)
    if ranks.main:
        write_text(run.logs / "preflight.json", json.dumps(table(found, faults), indent=1))
    console.log(summary(found, faults, guarding.slow_device))
    for fault in faults:
        told = {"ranks": fault.ranks, "hosts": fault.hosts, "measure": fault.measure, "rate": fault.rate}
        run.append_incident({"step": step, "kind": "preflight", "fault": fault.kind, **told, "share": fault.share})
        console.log(f"preflight: {fault.text}")
    ending = [one for one in _serious(faults, found) if one.kind == "broken" or guarding.on_slow_device == "stop"]
    if ending:
        raise FastavError(f"preflight: {listed([fault.text for fault in ending], _SHOWN)}")


def _serious(faults: Sequence[Fault], found: Sequence[Measured]) -> list[Fault]:
    """Faults but those of CPUs that are only slow: what they do depends on who else runs there."""
    cpus = {one.place.rank for one in found if one.place.device == "cpu"}
    return [fault for fault in faults if fault.kind == "broken" or not cpus.issuperset(fault.ranks)]


class Preflight:
    """Measures all ranks; every rank must make one, and run it.

    Each measurement runs in a thread that is waited for only so long, as no library call can be trusted to come back
    from a broken device or network. The ranks then meet over gloo, where one that does not come is found out.

    Args:
        crew: The processes.
        device: Of this one.
        seconds: Of each measurement.
        patience_s: Within which each measurement must end, warm-up and connecting included.

    Attributes:
        places: Where every rank is, in rank order.
        nodes: The ranks of each node.
    """

    def __init__(self, crew: Crew, device: torch.device, seconds: float, patience_s: float) -> None:
        self._crew, self.device, self._seconds, self._patience_s = crew, device, seconds, patience_s
        name, serial = gauges.identity(device)
        where = str(device) if device.type == "cuda" else device.type  # accelerate numbers CPUs
        told = crew.gather((node_of(os.environ), socket.gethostname(), where, name, serial))
        keys = list(dict.fromkeys(node for node, *_ in told))
        self.places = [Place(rank, host, keys.index(node), *rest) for rank, (node, host, *rest) in enumerate(told)]
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
            told = listed([one.tell() for one in without], _SHOWN)
            raise FastavError(f"preflight: no GPU can be used by {told}; the other ranks have one")

    def run(self) -> list[Measured]:
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
        return [Measured(place, rates, broken) for place, rates, broken in facts]

    def _local(self) -> Iterator[tuple[str, Callable[[], Rates]]]:
        measures = {"product": gauges.product, "copy": gauges.copy, "host": gauges.from_host}
        for key in measures if self.device.type == "cuda" else ("product", "copy"):
            yield key, lambda do=measures[key], key=key: {key: do(self.device, self._seconds)}  # type: ignore[misc]

    def _collective(self) -> Iterator[tuple[str, list[list[int]]]]:
        """Yields who is to measure what together: within the nodes, between them, and all."""
        yield "node", [ranks for ranks in self.nodes if len(ranks) > 1]
        for pairs in gauges.pairings(len(self.nodes)):
            ends = [zip(self.nodes[a], self.nodes[b], strict=False) for a, b in pairs]  # ranks of the same local number
            yield "exchange", [sorted(pair) for one in ends for pair in one]
        yield "all", [list(range(self._crew.world))] if len(self.nodes) > 1 else []

    def _everywhere(self, key: str, do: Callable[[], Rates], *, together: bool = False) -> list[Rates]:
        """Does something on all ranks; returns what every one has found, and notes who is broken."""
        stuck_s = 3 * self._patience_s
        faulthandler.dump_traceback_later(stuck_s, exit=True, file=sys.__stderr__ or 2)  # if even this thread hangs
        what = MEASURES[key][0]
        waited = f"{what}: no end within {self._patience_s:g} s"
        outcome = self._within(what, do)
        self._hung |= outcome is None
        self._meet(what)
        every = self._crew.gather(outcome or ({}, waited))
        self._broken = [why for _, why in every]
        if together and set(self._broken) - {"", waited}:  # who only waited for those that failed is not broken
            self._broken = [why if why != waited else "" for why in self._broken]
        return [rates for rates, _ in every]

    def _within(self, what: str, do: Callable[[], Rates]) -> tuple[Rates, str] | None:
        """Does something in a thread; returns what it found, and why it failed; None where it has not come back."""
        done: list[tuple[Rates, str]] = []

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
        if self._crew.world == 1:
            return
        wait_s = 1.5 * self._patience_s  # others may have waited for their own thread
        try:
            dist.monitored_barrier(self._crew.group, timedelta(seconds=wait_s), wait_all_ranks=True)
        except RuntimeError as error:
            missing = re.search(r"Ranks? ([\d, ]+?) (?:failed to pass|timed out in) monitoredBarrier", str(error))
            if self._crew.rank == 0 and missing:
                who = [self.places[int(rank)].tell() for rank in missing[1].split(",")]
                told = f"{listed(who, _SHOWN)} did not answer within {wait_s:g} s"
            else:
                told = f"not all ranks answered within {wait_s:g} s, rank 0 names them: {reason_of(error)[:200]}"
            raise FastavError(f"preflight: {what}: {told}") from None

    def _alone(self, key: str, do: Callable[[], Rates]) -> bool:
        """Measures something on every rank by itself; returns whether nobody is broken."""
        self._note(key, self._everywhere(key, do), [[place.rank] for place in self.places])
        return not any(self._broken)

    def _note(self, key: str, found: Sequence[Rates], teams: Sequence[Sequence[int]]) -> None:
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
        world, rank, calls = self._crew.world, self._crew.rank, gauges.SAMPLES
        team = next((team for team in teams if rank in team), [])
        kept: list[gauges.Talk] = []

        def begin() -> Rates:
            limit = timedelta(seconds=4 * self._patience_s)  # gloo's threads must not outlive the preflight for long
            # Every rank makes all groups, in the same order; the one of all ranks is there.
            groups = [None if len(one) == world else dist.new_group(one, timeout=limit) for one in teams]
            if not team:
                return {}
            make = gauges.Exchange if key == "exchange" else gauges.AllReduce
            talk = make(team, groups[teams.index(team)], rank, self.device)
            kept.append(talk)
            talk.run()
            once_s = gauges.took_s(self.device, talk.run)
            talk.check()  # last: whoever finds fault leaves nobody waiting
            return {"once_s": once_s}

        def measure() -> Rates:
            if not team:
                return {}
            (talk,) = kept
            rate = talk.num_bytes / gauges.median_s(self.device, talk.run, calls) / 1e9
            talk.check()
            if talk.group is not None:
                dist.destroy_process_group(talk.group)
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


if __name__ == "__main__":
    sys.exit(run_verb("preflight", "fastav.preflight", sys.argv[1:]))
