"""What is out of bounds: losses, gradients, ranks; and who failed first."""

from __future__ import annotations

import json
import math
import os
import signal

import pytest

from fastav.core.errors import FastavError
from fastav.distributed.rank_log import RankLog, record_flights
from fastav.optim.loss_guard import GuardConfig, LossGuard


def step(guard, loss, grad_norm=1.0, number=0, clips=()):
    """A step as the trainer takes it; returns what it was and whether it was taken."""
    kind = guard.classify(loss)
    kind, taken = guard.record(kind, loss, grad_norm if guard.allows_step(kind) else math.nan)
    if kind:
        guard.check(kind, number, loss, grad_norm, clips)
    return kind, taken


def test_steps_that_are_not_finite_are_left_out_counted_and_end_the_run():
    guard = LossGuard(GuardConfig(limit=3))
    assert step(guard, 1.0) == ("", True)
    assert step(guard, math.nan) == ("non-finite", False)
    assert step(guard, 1.0, math.inf) == ("non-finite", False)
    assert step(guard, 1.0) == ("", True)
    assert guard.skipped == 2
    step(guard, math.nan)
    resumed = LossGuard(GuardConfig(limit=3))
    resumed.load_state_dict(json.loads(json.dumps(guard.state_dict())))
    step(resumed, math.nan)
    message = r"step 6: loss nan, .*not finite for 3 steps in a row.*c0, c1, .*c7 and 2 more"
    with pytest.raises(FastavError, match=message):
        step(resumed, math.nan, number=6, clips=[f"c{n}" for n in range(10)])
    assert resumed.skipped == 5
    with pytest.raises(FastavError, match="not finite for 1 steps"):
        step(LossGuard(GuardConfig(on_non_finite="stop")), math.inf)


@pytest.mark.parametrize(("rule", "taken"), [("log", True), ("skip", False)])
def test_a_spike_is_measured_against_the_last_losses(rule, taken):
    guard = LossGuard(GuardConfig(spike=2.0, window=4, on_spike=rule))
    assert step(guard, 9.0) == ("", True), "nothing to measure it against yet"
    for loss in (1.0, 1.2, 0.8, 1.0):
        assert step(guard, loss) == ("", True)
    assert step(guard, 1.9) == ("", True)
    assert step(guard, 2.4) == ("spike", taken)
    assert guard.skipped == (not taken)
    resumed = LossGuard(GuardConfig(spike=2.0, window=4, on_spike=rule))
    resumed.load_state_dict(json.loads(json.dumps(guard.state_dict())))
    assert resumed.classify(2.4) == guard.classify(2.4)


def test_a_spike_may_end_the_run_and_names_the_clips():
    guard = LossGuard(GuardConfig(spike=2.0, window=2, on_spike="stop"))
    step(guard, 1.0)
    step(guard, 1.0)
    with pytest.raises(
        FastavError, match=r"step 7: loss 3 is more than 2 times the median of the last 2 losses, 1; .* a, b"
    ):
        step(guard, 3.0, number=7, clips=["a", "b"])


def test_slow_ranks_are_named():
    guard = LossGuard(GuardConfig())
    assert guard.slow_ranks([1.0, 1.1, 1.7, 1.0]) == [(2, pytest.approx(1.7))]
    assert guard.slow_ranks([1.0, 1.6]) == [(1, pytest.approx(1.6))]
    assert guard.slow_ranks([1.0, 1.4]) == []
    assert guard.slow_ranks([1.0]) == []
    assert LossGuard(GuardConfig(slow_rank=0)).slow_ranks([1.0, 9.0]) == []


def test_the_rank_that_failed_first_is_named(tmp_path):
    logs = [RankLog(tmp_path, rank, 3) for rank in range(3)]
    logs[2].fail(ValueError("the first"))
    logs[1].fail(RuntimeError("Connection closed by peer"))
    told, mine = logs[1].first_failure()
    assert told.startswith("rank 0 exited without an error record (killed or out of memory); see ")
    assert mine, "the lowest rank that is left tells it"
    assert not logs[2].first_failure()[1]
    logs[0].fail(RuntimeError("Connection closed by peer"))
    told, mine = logs[0].first_failure()
    assert mine
    assert "rank 2 on " in told
    assert told.endswith("failed first: ValueError: the first")
    assert "ValueError: the first" in (tmp_path / "rank_00002.log").read_text()
    again = RankLog(tmp_path, 2, 3)  # a restart removes its error record
    assert "rank 2 exited without an error record" in logs[0].first_failure()[0]
    for log in [*logs, again]:
        log.close()


def test_where_a_rank_hangs_can_be_asked(tmp_path):
    log = RankLog(tmp_path, 0, 1)
    os.kill(os.getpid(), signal.SIGUSR2)
    log.close()
    assert "test_where_a_rank_hangs_can_be_asked" in (tmp_path / "rank_00000.log").read_text()


def test_nccls_last_collectives_go_into_the_run(tmp_path):
    environment = {"TORCH_FR_BUFFER_SIZE": "7"}
    record_flights(tmp_path / "logs", environment)
    assert environment["TORCH_FR_BUFFER_SIZE"] == "7", "what a user has set stays"
    assert environment["TORCH_NCCL_DUMP_ON_TIMEOUT"] == "1"
    assert environment["TORCH_FR_DUMP_TEMP_FILE"] == str(tmp_path / "logs" / "flight_")
    assert (tmp_path / "logs").is_dir()
