"""The preflight at the start of a run: measures devices and network, records faults, and may end the run."""

from __future__ import annotations

import json

from fastav.core.atomic_files import write_text
from fastav.core.errors import FastavError, listed
from fastav.core.log_lines import Console
from fastav.diagnostics.rank_check import MAX_RANKS_NAMED, SECONDS, Preflight, serious_faults
from fastav.diagnostics.rank_verdicts import find_faults, summary, table
from fastav.optim.loss_guard import GuardConfig
from fastav.training.process_setup import Ranks
from fastav.training.run_folder import RunFolder


def before_training(ranks: Ranks, guard_config: GuardConfig, run: RunFolder, console: Console, step: int = 0) -> None:
    """Runs the preflight if the recipe enables it. Collective: every rank must call it.

    Args:
        ranks: The processes of the run.
        guard_config: Whether to measure, thresholds, and what happens to a run with slow ranks.
        run: Run folder for the measurements (`logs/preflight.json`) and incidents.
        console: Console of the main rank.
        step: Optimizer step at which the run starts or resumes, for the incidents.

    Raises:
        FastavError: A rank is broken or does not answer, or is slow with `guard.on_slow_device = "stop"`.
    """
    if guard_config.preflight == "never" or (guard_config.preflight == "auto" and ranks.world == 1):
        return
    preflight = Preflight(ranks.gloo_group, ranks.device, SECONDS, guard_config.preflight_patience_s)
    if guard_config.preflight == "auto" and len(preflight.nodes) == 1:
        return
    found = preflight.run()
    faults = find_faults(found, guard_config.slow_device)
    if ranks.main:
        write_text(run.logs / "preflight.json", json.dumps(table(found, faults), indent=1))
    console.log(summary(found, faults, guard_config.slow_device))
    for fault in faults:
        facts = {"ranks": fault.ranks, "hosts": fault.hosts, "measure": fault.measure, "rate": fault.rate}
        run.append_incident({"step": step, "kind": "preflight", "fault": fault.kind, **facts, "share": fault.share})
        console.log(f"preflight: {fault.text}")
    fatal = [
        one for one in serious_faults(faults, found) if one.kind == "broken" or guard_config.on_slow_device == "stop"
    ]
    if fatal:
        raise FastavError(f"preflight: {listed([fault.text for fault in fatal], MAX_RANKS_NAMED)}")
