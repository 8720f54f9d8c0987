"""Rows of a real SLURM: two nodes that are this machine, without root's system services."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import torch

from tests.acceptance.cluster_rows import common, launched, losses
from tests.acceptance.rows import Failed, Result, call, fresh, weights

_TOOLS = ("slurmctld", "slurmd", "munged", "sbatch", "scontrol")
_CONFIG = """
ClusterName=fastav
SlurmctldHost=localhost(127.0.0.1)
SlurmctldPort=16817
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={run}/munge.sock
StateSaveLocation={run}/state
SlurmdSpoolDir={run}/spool-%n
SlurmctldPidFile={run}/slurmctld.pid
SlurmdPidFile={run}/slurmd-%n.pid
SlurmctldLogFile={run}/slurmctld.log
SlurmdLogFile={run}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SwitchType=switch/none
MpiDefault=none
SlurmdParameters=config_overrides
ReturnToService=2
SelectType=select/cons_tres
NodeName=n1 NodeHostname=localhost NodeAddr=127.0.0.1 Port=17001 CPUs=1 RealMemory=4000
NodeName=n2 NodeHostname=localhost NodeAddr=127.0.0.1 Port=17002 CPUs=1 RealMemory=4000
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


@contextlib.contextmanager
def cluster(run: Path) -> Iterator[dict[str, str]]:
    """Two nodes that are up; yields the environment for its commands."""
    path = {"PATH": f"{os.environ['PATH']}:/usr/sbin:/sbin"}
    missing = [tool for tool in _TOOLS if not shutil.which(tool, path=path["PATH"])]
    if missing:
        raise Failed(f"needs slurm-wlm and munge: {', '.join(missing)} not found")
    for name in ("state", "spool-n1", "spool-n2"):
        (run / name).mkdir(parents=True, exist_ok=True)
    (run / "munge.key").write_bytes(os.urandom(1024))
    (run / "munge.key").chmod(0o600)
    (run / "slurm.conf").write_text(_CONFIG.format(run=run))
    environment = {**os.environ, **path, "SLURM_CONF": str(run / "slurm.conf")}
    munge = [
        f"--{name}={run}/munge.{end}"
        for name, end in (
            ("socket", "sock"),
            ("key-file", "key"),
            ("pid-file", "pid"),
            ("log-file", "log"),
            ("seed-file", "seed"),
        )
    ]
    daemons = [["munged", "--foreground", "--force", *munge], ["slurmctld", "-D", "-c"]]
    daemons += [["slurmd", "-D", "-N", node] for node in ("n1", "n2")]
    started = []
    try:
        for daemon in daemons:
            started.append(subprocess.Popen(daemon, env=environment, stdout=subprocess.DEVNULL,
                                            stderr=subprocess.DEVNULL))  # fmt: skip
            time.sleep(0.5)
        _until(lambda: _said(environment, "sinfo", "-h", "-o", "%T %D") == "idle 2", 60, "two idle nodes")
        yield environment
    finally:
        subprocess.run(["scancel", "--user=root", "--signal=KILL", "--full"], env=environment, capture_output=True)
        for process in reversed(started):
            process.terminate()
        for process in started:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(10)
            process.kill()


def _said(environment: dict[str, str], *words: str) -> str:
    return subprocess.run(words, env=environment, capture_output=True, text=True).stdout.strip()


def _until(found: object, seconds: float, what: str) -> None:
    deadline = time.monotonic() + seconds
    while not found():  # type: ignore[operator]
        if time.monotonic() > deadline:
            raise Failed(f"{what}: waited {seconds:.0f} s")
        time.sleep(0.2)


def slurm(work: Path) -> Result:
    """A real SLURM of two nodes: a 2-node job, preempted three times, ends with the parameters of the local run."""
    fresh(work)
    words = common(work, "--saving.every", "100", "--train.epochs", "10")
    call(*launched("ddp"), *words, "--out", str(work / "local"), env={"OMP_NUM_THREADS": "1"})
    run, log = work / "slurm", work / "job.log"
    with cluster((work / "cluster").resolve()) as environment:
        environment |= {
            "OMP_NUM_THREADS": "1", "FASTAV_PYTHON": sys.executable, "FASTAV_CACHE": str(work.resolve() / "cache"),
            "FASTAV_ACCELERATE_CONFIG": "launch/accelerate/cpu_2.yaml",
        }  # fmt: skip
        refused = _submit(environment, log, words, run)  # nodes n1 and n2 are no names that resolve
        _until(lambda: _state(environment, refused) in ("FAILED", "COMPLETED", ""), 60, "a job that cannot meet")
        unresolved = "cannot resolve host" in log.read_text()
        log.unlink()
        job = _submit(environment | {"MASTER_ADDR": "127.0.0.1"}, log, words, run)
        stopped_at: list[int] = []
        for _ in range(3):
            begin = max([0, *stopped_at])
            _until(lambda begin=begin: _step(run) > begin + 2, 240, f"a step after {begin}")
            _said(environment, "scancel", "--batch", "--signal=USR1", job)
            count = len(stopped_at) + 1
            _until(lambda count=count: log.read_text().count("requeued as job") == count, 120, "a requeue")
            stopped_at.append(json.loads((run / "status.json").read_text())["step"])
            _until(lambda: _state(environment, job) == "PENDING", 60, "a job that waits")
            time.sleep(3)  # within the second of the requeue the job's new credential counts as revoked
            _said(environment, "scontrol", "update", f"JobId={job}", "StartTime=now")
        _until(lambda: _status(run) == "done", 300, f"the end of the job: {log.read_text()[-1500:]}")
        restarts = _said(environment, "scontrol", "show", "job", job).partition("Restarts=")[2].split()[0]
    mine, theirs = weights(work / "local"), weights(run)
    same = all(torch.equal(mine[k], theirs[k]) for k in mine)
    figures = {"stopped_at": stopped_at, "restarts": restarts, "same bits": same, "steps": len(losses(run)),
               "unresolved name told": unresolved}  # fmt: skip
    return figures, same and restarts == "3" and unresolved and len(losses(run)) == len(losses(work / "local"))


def _submit(environment: dict[str, str], log: Path, words: list[str], run: Path) -> str:
    command = ["sbatch", "--parsable", "--nodes=2", "--ntasks-per-node=1", f"--output={log}",
               "launch/slurm/train.sbatch", *words, "--out", str(run)]  # fmt: skip
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise Failed(f"sbatch: {done.stderr}")
    return done.stdout.strip()


def _state(environment: dict[str, str], job: str) -> str:
    return _said(environment, "scontrol", "show", "job", job).partition("JobState=")[2].partition(" ")[0]


def _status(run: Path) -> str:
    with contextlib.suppress(OSError, ValueError):
        return str(json.loads((run / "status.json").read_text())["state"])
    return ""


def _step(run: Path) -> int:
    with contextlib.suppress(OSError):
        return max(losses(run), default=0)
    return 0


SLURM_ROWS = {"slurm": slurm}
