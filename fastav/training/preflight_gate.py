"""The preflight at the start of a run: measures, records, and ends the run where the recipe says so."""

from __future__ import annotations

import json

from fastav.core.atomic_files import write_text
from fastav.core.console import Console
from fastav.core.errors import FastavError, listed
from fastav.diagnostics.rank_check import MAX_RANKS_NAMED, SECONDS, Preflight, serious_faults
from fastav.diagnostics.rank_verdicts import find_faults, summary, table
from fastav.optim.loss_guard import GuardConfig
from fastav.training.ranks import Ranks
from fastav.training.run_folder import RunFolder


def before_training(ranks: Ranks, guard_config: GuardConfig, run: RunFolder, console: Console, step: int = 0) -> None:
    """Measures at the start of a run, where the recipe says so; every rank must call it.

    Args:
        ranks: The processes.
        guard_config: Says whether, and what becomes of slow ranks.
        run: Where figures (`logs/preflight.json`) and incidents go.
        console: Of the main rank.
        step: At which the run goes on.

    Raises:
        FastavError: A rank is broken or does not answer, or is slow and the recipe ends the run there.
    """
    if guard_config.preflight == "never" or (guard_config.preflight == "auto" and ranks.world == 1):
        return
    preflight = Preflight(ranks.host_group, ranks.device, SECONDS, guard_config.preflight_patience_s)
    if guard_config.preflight == "auto" and len(preflight.nodes) == 1:
        return
    found = preflight.run()
    faults = find_faults(found, guard_config.slow_device)
    if ranks.main:
        write_text(run.logs / "preflight.json", json.dumps(table(found, faults), indent=1))
    console.log(summary(found, faults, guard_config.slow_device))
    for fault in faults:
        told = {"ranks": fault.ranks, "hosts": fault.hosts, "measure": fault.measure, "rate": fault.rate}
        run.append_incident({"step": step, "kind": "preflight", "fault": fault.kind, **told, "share": fault.share})
        console.log(f"preflight: {fault.text}")
    ending = [
        one for one in serious_faults(faults, found) if one.kind == "broken" or guard_config.on_slow_device == "stop"
    ]
    if ending:
        raise FastavError(f"preflight: {listed([fault.text for fault in ending], MAX_RANKS_NAMED)}")
