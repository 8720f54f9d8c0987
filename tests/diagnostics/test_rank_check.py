"""Preflight: slow, broken and silent ranks are named; sound ones leave their figures in the run folder."""

from __future__ import annotations

import json
import math
import os
import re
import subprocess
import sys

import pytest
import torch

from fastav.__main__ import main
from fastav.core.errors import FastavError
from fastav.diagnostics import device_tests
from fastav.diagnostics.rank_check import Preflight, node_of
from fastav.diagnostics.rank_verdicts import RankMeasurement, RankPlace, find_faults, medians, summary, table
from fastav.distributed.gloo_group import GlooGroup
from fastav.recipe.parse import CHANGEABLE, load_recipe, parse_recipe, to_table
from tests import ROOT

ENVIRONMENT = {
    name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")
} | {
    "OMP_NUM_THREADS": "1",
    "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")]),
}
TORCHRUN = [sys.executable, "-m", "torch.distributed.run"]


def measured(rank, of_node=4, name="NVIDIA H200", **rates):
    """A rank of a cluster whose nodes have so many."""
    node = rank // of_node
    place = RankPlace(rank, f"node{node}", node, f"cuda:{rank % of_node}", name, f"GPU-{rank:04x}")
    usual = {"product": 600.0, "copy": 4000.0, "node": 400.0, "exchange": 40.0, "all": 90.0}
    return RankMeasurement(place, usual | rates)


def texts(found, slow=0.8):
    return [fault.text for fault in find_faults(found, slow)]


def test_sound_ranks_are_told_with_their_medians():
    found = [measured(rank, product=600.0 + rank) for rank in range(8)]
    assert find_faults(found, 0.8) == []
    assert summary(found, [], 0.8) == (
        "preflight: 8 ranks on 2 nodes: matrix product 604 TFLOP/s, copy 4000 GB/s, all-reduce in the node 400 GB/s, "
        "exchange between nodes 40 GB/s, all-reduce of all ranks 90 GB/s; all within 0.8 of the median"
    )
    assert json.loads(json.dumps(table(found, [])))["ranks"][3]["rates"]["product"] == 603.0


def test_a_slow_rank_is_told_with_its_device():
    found = [measured(rank, product=372.0 if rank == 3 else 600.0) for rank in range(8)]
    assert texts(found) == [
        "rank 3 (host node0, cuda:3, NVIDIA H200, GPU-0003): matrix product 372 TFLOP/s, 0.62 of the median"
    ]
    (fault,) = find_faults(found, 0.8)
    assert (fault.kind, fault.ranks, fault.hosts, fault.measure) == ("slow", (3,), ("node0",), "product")
    assert fault.share == pytest.approx(0.62)
    assert texts(found, slow=0.6) == []
    assert texts(found, slow=0) == []
    assert "all within" not in summary(found, find_faults(found, 0.8), 0.8)


def test_the_slow_ranks_of_a_node_are_told_as_the_node():
    slow = {4: 10.0, 5: 12.0, 6: 10.0, 7: 10.0}
    found = [measured(rank, exchange=slow.get(rank, 40.0), node=200.0 if rank >= 8 else 400.0) for rank in range(12)]
    assert texts(found) == [
        "node 2 (host node2), ranks 8, 9, 10, 11: all-reduce in the node 200 GB/s, 0.50 of the median",
        "node 1 (host node1), ranks 4, 5, 6, 7: exchange between nodes 10 GB/s to 12, 0.25 to 0.30 of the median",
    ]


def test_of_two_nodes_nobody_knows_which_end_of_their_link_is_slow():
    found = [measured(rank, exchange=4.0 if rank % 4 == 1 else 40.0) for rank in range(8)]
    assert texts(found) == [
        "ranks 1, 5 (hosts node0, node1): exchange between nodes 4 GB/s, 0.10 of the median; with two nodes, the "
        "cause may be either one or the link between them"
    ]


def test_of_two_the_faster_one_is_the_measure():
    assert len(texts([measured(0, product=700.0), measured(1, product=500.0)])) == 1


def test_like_is_compared_with_like():
    found = [measured(rank, product=150.0, name="NVIDIA A100") for rank in (0, 1)]
    found += [measured(2), measured(3), measured(4, name="NVIDIA L4", product=30.0)]
    assert texts(found) == []
    assert medians(found)["NVIDIA A100"]["product"] == 150.0
    assert "NVIDIA A100: matrix product 150 TFLOP/s" in summary(found, [], 0.8)
    uneven = [measured(rank, node=400.0) for rank in range(4)] + [measured(rank, node=100.0) for rank in (4, 5)]
    assert texts(uneven) == [], "two ranks of a node are not compared with four of another"


def test_all_ranks_together_have_one_rate():
    assert texts([measured(rank, all=1.0 if rank else 90.0) for rank in range(4)]) == []


def test_broken_and_missing_ranks():
    found = [measured(rank) for rank in range(8)]
    found[2] = RankMeasurement(found[2].place, {}, "matrix product: CUDA error: device-side assert")
    for rank in (4, 5):
        found[rank] = measured(rank, copy=math.nan, node=None)
    assert texts(found) == [
        "rank 2 (host node0, cuda:2, NVIDIA H200, GPU-0002): broken: matrix product: CUDA error: device-side assert",
        "node 1 (host node1), ranks 4, 5: broken: no measurement of copy and all-reduce in the node",
    ]
    assert [fault.kind for fault in find_faults(found, 0.8)] == ["broken", "broken"]


@pytest.mark.parametrize("num_nodes", range(1, 8))
def test_every_node_exchanges_with_two_others(num_nodes):
    partners = {node: set() for node in range(num_nodes)}
    for pairs in device_tests.pairings(num_nodes):
        ends = [end for pair in pairs for end in pair]
        assert len(ends) == len(set(ends)), "one partner at a time"
        for a, b in pairs:
            partners[a].add(b)
            partners[b].add(a)
    assert all(len(others) == min(2, num_nodes - 1) for others in partners.values())


def test_nodes_are_told_apart_by_what_started_the_ranks():
    assert node_of({"GROUP_RANK": "3", "TORCHELASTIC_RUN_ID": "x", "SLURM_NODEID": "0", "SLURM_PROCID": "0"}) == "3"
    assert node_of({"SLURM_NODEID": "5", "SLURM_PROCID": "9", "RANK": "9"}) == "5"
    assert node_of({"SLURM_NODEID": "0", "SLURM_PROCID": "0", "RANK": "9"}) == node_of({}) == os.uname().nodename


def spoiled(calls, row):
    """A product that is wrong in one number, from so many calls on."""
    count = 0

    def multiply(a, b, out=None, mm=torch.mm):
        nonlocal count
        count += 1
        result = mm(a, b, out=out)
        result[row, 64] += count > calls
        return result

    return multiply


@pytest.mark.parametrize(
    ("calls", "row", "message"),
    [
        (0, 32, "1 of 4096 numbers differ from the float64 result"),
        (0, 5, "2 of 262144 numbers differ when they are computed in other rows"),
        (2, 5, "1 of 262144 numbers differ when they are computed again"),
    ],
)
def test_a_product_that_is_wrong_in_one_number_is_found(monkeypatch, calls, row, message):
    device = torch.device("cpu")
    assert device_tests.matmul_rate(device, 0.001) > 0
    monkeypatch.setattr(torch, "mm", spoiled(calls, row))
    with pytest.raises(FastavError, match=message):
        device_tests.matmul_rate(device, 0.001)


@pytest.fixture(scope="module")
def unfit():
    """What the preflight of two ranks finds where rank 1 is not fit, by case."""
    cases = ["well", "wrong product", "failing product", "wrong sum", "late", "failing sum", "gone"]
    command = [*TORCHRUN, "--standalone", "--nproc-per-node", "2", "tests/ranks/unfit.py", *cases]
    done = subprocess.run(command, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, timeout=280)
    found = [json.loads(line.split("FOUND ")[1]) for line in done.stdout.splitlines() if "FOUND " in line]
    assert [one["case"] for one in found] == cases, done.stdout[-1000:] + done.stderr[-3000:]
    return {one["case"]: one for one in found}


def test_two_ranks_measure_each_other(unfit):
    assert unfit["well"]["told"] == []
    for rates in unfit["well"]["rates"]:
        assert rates.keys() == {"product", "copy", "node"}
        assert all(rate > 0 for rate in rates.values())


@pytest.mark.parametrize(
    ("case", "reason"),
    [
        ("wrong product", "matrix product: 2 of 262144 numbers differ when they are computed in other rows"),
        ("failing product", "matrix product: CUDA error: an illegal memory access was encountered"),
        ("wrong sum", "all-reduce in the node: 1 of 1048576 sums over 2 ranks are wrong"),
        ("late", "matrix product: timed out after 5 s"),
        ("failing sum", "all-reduce in the node: NCCL error: unhandled system error"),
    ],
)
def test_a_broken_rank_is_named_and_the_other_is_not(unfit, case, reason):
    (told,) = unfit[case]["told"]
    assert re.fullmatch(rf"rank 1 \(host \S+, cpu, CPU\): broken: {re.escape(reason)}", told)


def test_a_rank_that_does_not_answer_is_named(unfit):
    (told,) = unfit["gone"]["told"]
    assert re.fullmatch(r"preflight: matrix product: rank 1 \(host \S+, cpu, CPU\) did not answer within 7.5 s", told)


def test_the_verb_prints_a_line_a_rank_and_writes_everything(tmp_path, capsys):
    assert main(["preflight", "--seconds", "0.01", "--json", str(tmp_path / "all.json")]) == 0
    first, last = capsys.readouterr().out.splitlines()
    assert re.fullmatch(r"rank 0 \(host \S+, cpu, CPU\): matrix product \S+ TFLOP/s, copy \S+ GB/s", first)
    assert re.fullmatch(r"preflight: 1 rank on 1 node: matrix product \S+ TFLOP/s, copy \S+ GB/s", last)
    written = json.loads((tmp_path / "all.json").read_text())
    assert written["ranks"][0]["rates"].keys() == {"product", "copy"}
    assert written["faults"] == []


def test_the_verb_ends_with_1_for_a_broken_rank(monkeypatch, capsys):
    monkeypatch.setattr(torch, "mm", spoiled(0, 32))
    assert main(["preflight", "--seconds", "0.01"]) == 1
    told = capsys.readouterr().out
    assert re.search(r"^rank 0 \(host \S+, cpu, CPU\): broken: matrix product: 1 of 4096 numbers", told, flags=re.M)


def slow_gpu(self):
    return [measured(0), measured(1, product=300.0)]


def slow_cpu(self):
    return [RankMeasurement(RankPlace(rank, "node0", 0, "cpu", "CPU"), {"copy": 9.0 / (rank + 1)}) for rank in (0, 1)]


def test_slow_ranks_count_but_on_a_cpu(monkeypatch, capsys):
    monkeypatch.setattr(Preflight, "run", slow_gpu)
    assert main(["preflight"]) == 1
    assert "slow: rank 1 (host node0, cuda:1, NVIDIA H200, GPU-0001): matrix" in capsys.readouterr().out
    assert main(["preflight", "--slow", "0.4"]) == 0
    monkeypatch.setattr(Preflight, "run", slow_cpu)
    assert main(["preflight"]) == 0
    assert "slow: rank 1 (host node0, cpu, CPU): copy 4.5 GB/s, 0.50 of the median" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--seconds", "0"], "--seconds 0: expected more than 0"),
        (["--slow", "2"], "--slow 2: expected a share from 0 to 1"),
        (["--patients", "2"], '--patients 2; did you mean "--patience"?'),
    ],
)
def test_mistakes(words, message, capsys):
    assert main(["preflight", *words]) == 2
    assert message in capsys.readouterr().err


def test_the_recipe_chooses(tiny_packed, tmp_path, capsys, monkeypatch):
    words = tiny_packed("video", tmp_path / "run", "--train.epochs", "0.2", "--data.test", "")
    assert main(["train", "launch/recipes/quickstart_video.toml", *words]) == 0
    file = tmp_path / "run" / "logs" / "preflight.json"
    assert not file.exists(), "a single node"
    assert main(["train", "launch/recipes/quickstart_video.toml", *words, "--guard.preflight", "always"]) == 0
    assert json.loads(file.read_text())["ranks"][0]["rates"].keys() == {"product", "copy"}
    assert "preflight: 1 rank on 1 node: matrix product" in capsys.readouterr().err
    assert not (tmp_path / "run" / "incidents.jsonl").exists()
    monkeypatch.setattr(Preflight, "run", slow_gpu)
    more = ["--guard.preflight", "always", "--train.epochs", "0.2"]
    assert main(["train", "launch/recipes/quickstart_video.toml", *words, *more]) == 0
    assert "preflight: rank 1 (host node0, cuda:1" in capsys.readouterr().err
    row = json.loads((tmp_path / "run" / "incidents.jsonl").read_text())
    assert (row["kind"], row["fault"], row["ranks"], row["measure"]) == ("preflight", "slow", [1], "product")
    more += ["--guard.on_slow_device", "stop", "--out", str(tmp_path / "stopped")]
    assert main(["train", "launch/recipes/quickstart_video.toml", *words, *more]) == 1
    assert "fastav: preflight: rank 1 (host node0, cuda:1, NVIDIA H200, GPU-0001)" in capsys.readouterr().err
    assert json.loads((tmp_path / "stopped" / "status.json").read_text())["state"] == "failed"
    monkeypatch.setattr(Preflight, "run", slow_cpu)
    assert main(["train", "launch/recipes/quickstart_video.toml", *words, *more]) == 0, "on a CPU it is only told"


def test_a_broken_rank_always_ends_the_run(tiny_packed, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(torch, "mm", spoiled(0, 32))
    words = tiny_packed("video", tmp_path / "run", "--guard.preflight", "always")
    assert main(["train", "launch/recipes/quickstart_video.toml", *words]) == 1
    assert "broken: matrix product: 1 of 4096 numbers differ from the float64 result" in capsys.readouterr().err
    assert json.loads((tmp_path / "run" / "logs" / "preflight.json").read_text())["faults"][0]["kind"] == "broken"


def test_the_keys_may_change_on_resume_and_older_recipes_have_none():
    keys = ("preflight", "slow_device", "on_slow_device", "preflight_patience_s")
    assert all(f"guard.{key}" in CHANGEABLE for key in keys)
    older = to_table(load_recipe(None))
    for key in keys:
        del older["guard"][key]
    assert parse_recipe(older, {}, "an older checkpoint") == load_recipe(None)


def test_a_run_on_two_nodes_measures_what_is_between_them(tiny_packed, tmp_path):
    words = tiny_packed("video", tmp_path / "run", "--train.epochs", "0.2", "--data.test", "")
    nodes = [
        subprocess.Popen(
            [
                *TORCHRUN, "--nnodes", "2", "--node-rank", str(node), "--nproc-per-node", "1",
                "--master-addr", "127.0.0.1", "--master-port", str(29_200 + os.getpid() % 300),
                "-m", "fastav.train", "launch/recipes/quickstart_video.toml", *words,
            ],
            cwd=ROOT, env=ENVIRONMENT, stderr=subprocess.PIPE, text=True,
        )
        for node in range(2)
    ]  # fmt: skip
    told = [node.communicate(timeout=240)[1] for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], told[0][-2000:] + told[1][-2000:]
    assert "preflight: 2 ranks on 2 nodes: matrix product" in "".join(told)
    written = json.loads((tmp_path / "run" / "logs" / "preflight.json").read_text())
    assert [one["node"] for one in written["ranks"]] == [0, 1]
    assert all(one["rates"].keys() == {"product", "copy", "exchange", "all"} for one in written["ranks"])


@pytest.mark.parametrize(
    ("tasks", "node", "expected"),
    [
        ("8", 0, "8"),
        ("8(x2)", 1, "8"),
        ("8(x2),4", 1, "8"),
        ("8(x2),4", 2, "4"),
        ("1,3(x2),2", 2, "3"),
        ("1,2", 1, "2"),
    ],
)
def test_slurm_ranks_know_how_many_share_their_node(tmp_path, tasks, node, expected):
    """With stand-ins for SLURM's commands."""
    made = {
        "scontrol": "echo localhost",
        "srun": 'while [[ $1 == -* ]]; do shift; done; exec "$@"',
        "python": 'echo "$LOCAL_WORLD_SIZE $RANK $LOCAL_RANK $WORLD_SIZE $*"',
    }
    for name, text in made.items():
        (tmp_path / name).write_text(f"#!/usr/bin/env bash\n{text}\n")
        (tmp_path / name).chmod(0o755)
    slurm = {
        "PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_JOB_NODELIST": "n[1-9]", "SLURM_JOB_ID": "7",
        "SLURM_STEP_TASKS_PER_NODE": tasks, "SLURM_NODEID": str(node), "SLURM_PROCID": "3", "SLURM_LOCALID": "1",
        "SLURM_NTASKS": "20", "MASTER_ADDR": "localhost",
    }  # fmt: skip
    command = ["bash", "launch/slurm/train.sbatch", "recipe.toml"]
    done = subprocess.run(command, cwd=ROOT, env=slurm, capture_output=True, text=True, timeout=60)
    assert done.stdout == f"{expected} 3 1 20 -m fastav.train recipe.toml --train.num_processes 20\n", done.stderr
    slurm["FASTAV_VERB"] = "preflight"
    done = subprocess.run(command[:2], cwd=ROOT, env=slurm, capture_output=True, text=True, timeout=60)
    assert done.stdout == f"{expected} 3 1 20 -m fastav preflight\n", done.stderr
    slurm["FASTAV_VERB"] = "preflite"
    done = subprocess.run(command[:2], cwd=ROOT, env=slurm, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert "FASTAV_VERB is preflite; expected train, preflight or scale" in done.stderr


def test_a_node_without_a_gpu_among_others_is_named():
    class Some(GlooGroup):
        def gather(self, item):
            return [("0", "n1", "cuda:0", "NVIDIA H200", "GPU-1"), ("1", "n2", "cpu", "CPU", "")]

    with pytest.raises(FastavError, match=r"no usable GPU on rank 1 \(host n2, cpu, CPU\); the other ranks have"):
        Preflight(Some(0, 2, None), torch.device("cpu"), 0.1, 5.0)


def test_a_device_that_fails_for_good_is_still_told(monkeypatch):
    """After an illegal access every call into CUDA fails, that which frees memory too."""
    preflight = Preflight(GlooGroup(), torch.device("cpu"), 0.1, 5.0)
    preflight.device = torch.device("cuda", 0)
    broken = RuntimeError("CUDA error: an illegal memory access was encountered")

    def fail(*words):
        raise broken

    monkeypatch.setattr(torch.cuda, "empty_cache", fail)
    monkeypatch.setattr(torch.cuda, "set_device", fail)
    (found,) = preflight.run()
    assert "illegal memory access" in found.broken
