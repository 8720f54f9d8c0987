"""Ways to spread a model over ranks: equal numbers, and state that any of them takes from any other."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys

import pytest

from fastav.core.errors import UserError
from fastav.distributed.strategy_choice import requested
from fastav.distributed.zero import check_settings
from tests import ROOT

SPREAD = ("ddp", "fsdp", "zero1", "zero2", "zero3", "zero3_offload")


@pytest.fixture(scope="module")
def lines():
    """One line for each strategy, without and with accumulation and clipping."""
    words = [f"{name},{rest}" for rest in ("1,0", "2,0.5") for name in SPREAD]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    paths = os.pathsep.join([str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": paths, "TORCHDYNAMO_DISABLE": "1"}
    done = subprocess.run(
        [*torchrun, "tests/ranks/spread.py", *words],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=280,
    )
    found = [json.loads(line.split("FOUND ")[1]) for line in done.stdout.splitlines() if "FOUND " in line]
    assert len(found) == len(words), done.stdout[-1000:] + done.stderr[-3000:]
    return {one["name"]: one for one in found}


@pytest.mark.parametrize("rest", ["1 0.0", "2 0.5"])
@pytest.mark.parametrize("name", SPREAD[1:])
def test_every_strategy_computes_the_same(lines, name, rest):
    mine, ddp = lines[f"{name} {rest}"], lines[f"ddp {rest}"]
    assert mine["norms"] == pytest.approx(ddp["norms"], rel=1e-6)
    assert mine["averaged"] == pytest.approx(ddp["averaged"], abs=1e-5)
    for kind, sums in ddp["sums"].items():
        assert mine["sums"][kind].keys() == sums.keys(), "a checkpoint holds the same under every strategy"
        assert mine["sums"][kind] == pytest.approx(sums, rel=1e-5, abs=1e-5)
    assert 0 < ddp["shares"][0] < len(ddp["sums"]["model"]), "each rank writes a part"


def test_the_launcher_chooses(tmp_path):
    file = tmp_path / "zero.json"
    file.write_text('{"zero_optimization": {"stage": 2}}')
    deepspeed = {"ACCELERATE_USE_DEEPSPEED": "true"}
    fsdp = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}
    assert requested(1, {}).name == "single"
    assert requested(2, {}).name == "ddp"
    assert requested(2, fsdp).settings == {"reshard": True}
    assert requested(2, fsdp | {"FSDP_RESHARD_AFTER_FORWARD": "false"}).settings == {"reshard": False}
    assert requested(2, deepspeed | {"ACCELERATE_DEEPSPEED_CONFIG_FILE": str(file)}).name == "zero2"
    offload = {"ACCELERATE_DEEPSPEED_ZERO_STAGE": "3", "ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE": "cpu"}
    told = requested(2, deepspeed | offload)
    assert told.name == "zero3"
    for file in (ROOT / "launch" / "accelerate").glob("*.yaml"):
        name = requested(2, {"FASTAV_ACCELERATE_CONFIG": str(file)}).name
        assert name == ((re.findall(r"zero\d|fsdp", file.stem) or ["ddp"])[0])
    assert told.settings["zero_optimization"]["offload_optimizer"] == {"device": "cpu"}


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"ACCELERATE_USE_FSDP": "true"}, "fsdp_version = 1: expected 2"),
        ({"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_OFFLOAD_PARAMS": "true"}, "zero3_offload.json"),
        (
            {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_ACTIVATION_CHECKPOINTING": "true"},
            "set train.activation_checkpointing instead",
        ),
        (
            {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_CONFIG_FILE": "no/such.json"},
            "no/such.json: cannot read DeepSpeed's settings: No such file",
        ),
        ({"FASTAV_ACCELERATE_CONFIG": "no/such.yaml"}, "FASTAV_ACCELERATE_CONFIG=no/such.yaml: cannot read it"),
        (
            {"FASTAV_ACCELERATE_CONFIG": "launch/deepspeed/zero1.json"},
            'distributed_type = "None": expected NO, MULTI',
        ),
    ],
)
def test_what_the_launcher_cannot_have_is_refused(environment, message):
    with pytest.raises(UserError, match=message):
        requested(2, environment)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"gradient_accumulation_steps": 4}, "gradient_accumulation_steps = 4: the recipe sets this"),
        ({"gradient_clipping": 1.0}, "gradient_clipping = 1.0: the recipe sets this"),
        ({"bf16": {"enabled": True}}, '"bf16" is set, but the recipe sets it by optim and train.precision'),
        ({"optimizer": {"type": "Adam"}}, '"optimizer" is set'),
        ({"zero_optimization": {"stage": 0}}, r"zero_optimization\.stage = 0: expected 1, 2 or 3"),
    ],
)
def test_deepspeed_may_not_set_what_the_recipe_sets(settings, message):
    with pytest.raises(UserError, match=message):
        check_settings({"zero_optimization": {"stage": 1}} | settings, "zero.json")
    assert check_settings({"zero_optimization": {"stage": 1}, "bf16": {"enabled": False}}, "zero.json") == 1


def test_every_config_in_launch_is_read():
    for file in (ROOT / "launch" / "deepspeed").glob("*.json"):
        assert f"zero{check_settings(json.loads(file.read_text()), file.name)}" == file.stem.partition("_")[0]
