"""The model on a batch that stays on the device: `python -m benchmarks model [--frames mean|shared] [--batch 64]`.

Measures forward, forward and backward, and the full step (loss, AdamW). Variants are timm's blocks with `torch.cat`
(`benchmarks.literal`), eager and compiled, and fastav's model, compiled, with each implementation of the attention.
All variants are first compared with each other, then timed in alternation: clips/s, MFU, peak memory. Graph breaks and
compile times are reported separately. Without a GPU, a small model is checked and nothing is timed.
"""

from __future__ import annotations

import argparse
import itertools
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch._dynamo.utils import counters

from benchmarks import result as results
from benchmarks.console import open_console
from benchmarks.kernels.ceilings import timed
from benchmarks.literal import Literal
from benchmarks.timing import interleave, median, paired_ratio, per_second
from fastav.core.command_runner import Parser
from fastav.core.errors import FastavError
from fastav.core.machine import peak_flops
from fastav.media.spectrogram import Frontend
from fastav.model.av_model import AVModel, Inputs, Model
from fastav.model.fusion import Bottleneck
from fastav.model.tower import TowerConfig

PASSES = ("forward", "forward and backward", "step")
_PLOTTED = {f"{what}: clips_per_s": f"{what}, clips per second" for what in PASSES}
_CLASSES = tuple(f"class {i}" for i in range(60))
_TINY = {"patch_size": 8, "embed_dim": 64, "depth": 3, "num_heads": 2}
_BASELINE = "timm, cat, compiled"
_TOLERANCE = {"cpu": 1e-4, "cuda": 5e-2}  # relative: in fp32, and in bfloat16 with other orders of summation


@dataclass
class Variant:
    """One way to run the model.

    Attributes:
        name: Name of the variant.
        model: A copy of the model; all copies have the same parameters.
        run: The model or its compiled version, called with frames and spectrogram.
        compile_s: Compile time: seconds of the first forward and backward pass minus those of the second.
        graph_breaks: Number of graph breaks; None for eager.
    """

    name: str
    model: nn.Module
    run: Callable[[Tensor, Tensor], Tensor]
    compile_s: float = 0.0
    graph_breaks: int | None = None


def arguments(words: Sequence[str] | None) -> argparse.Namespace:
    """Reads the suite's options."""
    parser = Parser(prog="python -m benchmarks model", description=__doc__,
                    formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument("--frames", choices=("mean", "shared"), default="mean", help="model.fusion.frames (mean)")
    parser.add_argument("--batch", type=int, default=64, help="clips per batch (64)")
    parser.add_argument("--rounds", type=int, default=11, help="measured rounds (11)")
    parser.add_argument(
        "--only", default="", metavar="TEXT", help=f"only variants whose name contains this text, and {_BASELINE!r}"
    )
    parser.add_argument("--out", type=Path, help="JSON file of the result (in benchmarks/results/)")
    return parser.parse_args(words)


def main(words: Sequence[str] | None = None) -> int:
    """Runs the suite."""
    args, console = arguments(words), open_console()
    torch._dynamo.config.recompile_limit = 64  # variants share source code, but each is compiled
    device = "cuda" if torch.cuda.is_available() else "cpu"
    found = results.new("model", list(words or []), {"frames": [args.frames], "pass": list(PASSES)})
    inputs = Inputs() if device == "cuda" else Inputs(frames=2, image_size=32, num_mels=16, window=24)
    tower = TowerConfig() if device == "cuda" else TowerConfig(name="vit_tiny_patch16_224", args=_TINY)
    batch = _batch(inputs, args.batch if device == "cuda" else 2, device)
    variants = [
        one for one in _variants(args.frames, tower, inputs, device) if args.only in one.name or one.name == _BASELINE
    ]
    _check(variants, batch, device, console)
    if device == "cuda":
        _time(found, console, variants, batch, args)
    else:
        found["notes"].append("no GPU: a small model was checked, nothing was timed")
        console.print(found["notes"][-1])
    for one in variants:
        row = {"compile_s": round(one.compile_s, 2), "graph_breaks": one.graph_breaks}
        found["runs"].append({"variant": one.name, "repeat": 0, **row})
    if device == "cuda" or args.out:
        console.print(f"wrote {results.write(found, args.out, _PLOTTED)}", highlight=False)
    return 0


def _batch(inputs: Inputs, clips: int, device: str) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    side = inputs.image_size
    frames = torch.randint(0, 256, (clips, inputs.frames, 3, side, side), generator=generator, dtype=torch.uint8)
    mel = torch.randn(clips, 1, 1, inputs.num_mels, inputs.window, generator=generator) * 20 - 40
    return frames.to(device), mel.to(device)


def _variants(frames: Any, tower: TowerConfig, inputs: Inputs, device: str) -> list[Variant]:
    """Creates all variants, with the same parameters."""

    def make(attention: str) -> AVModel:
        torch.manual_seed(0)
        depth = tower.args.get("depth", 12)
        fusion = Bottleneck(start=depth * 2 // 3, frames=frames, attention=attention)
        config = Model(video=tower, audio=tower, fusion=fusion)
        return AVModel(config, _CLASSES, inputs, Frontend(num_mels=inputs.num_mels, mean=-40.0, std=20.0)).to(device)

    literal = Literal(make("sdpa"))
    made = [Variant("timm, cat, eager", literal, literal)]
    backend = "inductor" if device == "cuda" else "aot_eager"
    attentions = ["sdpa", *(["masked"] if frames == "shared" else [])]
    attentions += ["flex", "triton"] if device == "cuda" else []  # without a GPU, flex has no gradient
    models: dict[str, nn.Module] = {_BASELINE: Literal(make("sdpa"))}
    models |= {f"ours, {name}, compiled": make(name) for name in [*attentions, "auto"]}
    made += [Variant(name, model, torch.compile(model, backend=backend)) for name, model in models.items()]
    return made


def _check(variants: Sequence[Variant], batch: tuple[Tensor, Tensor], device: str, console: Console) -> None:
    """Compares logits and gradients of all variants with eager; records compile times and graph breaks.

    Raises:
        FastavError: A variant differs by more than the tolerance.
    """
    expected: tuple[Tensor, Tensor] | None = None
    for one in variants:
        counters.clear()
        begun = time.perf_counter()
        found = _once(one, batch, device)
        middle = time.perf_counter()
        _once(one, batch, device)
        one.compile_s = max(0.0, middle - begun - (time.perf_counter() - middle))
        if one.name.endswith("compiled"):
            one.graph_breaks = sum(counters["graph_break"].values())
        if expected is None:
            expected = found
        errors = [float((a - b).norm() / b.norm()) for a, b in zip(found, expected, strict=True)]
        console.print(
            f"{one.name}: relative difference from eager: logits {errors[0]:.1e}, gradient of the bottleneck "
            f"{errors[1]:.1e}; graph breaks {one.graph_breaks}, compiled in {one.compile_s:.1f} s", highlight=False,
        )  # fmt: skip
        if not max(errors) <= _TOLERANCE[device]:
            raise FastavError(
                f"{one.name}: differs from eager by {max(errors):.1e}, expected at most {_TOLERANCE[device]}"
            )


def _once(one: Variant, batch: tuple[Tensor, Tensor], device: str) -> tuple[Tensor, Tensor]:
    """Runs a forward and backward pass and waits for it; returns logits and the gradient of the bottleneck."""
    logits = _forward(one, batch, device)
    _loss(logits).backward()
    grads = dict(one.model.named_parameters())
    name = next(name for name in grads if name.endswith("fusion.bottleneck"))
    grad = grads[name].grad
    assert grad is not None
    grad = grad.clone()
    one.model.zero_grad(set_to_none=True)
    if device == "cuda":
        torch.cuda.synchronize()
    return logits.detach().float(), grad


def _forward(one: Variant, batch: tuple[Tensor, Tensor], device: str) -> Tensor:
    with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
        return one.run(*batch)


def _loss(logits: Tensor) -> Tensor:
    return nn.functional.cross_entropy(logits.float(), torch.arange(len(logits), device=logits.device) % 60)


def _runner(one: Variant, what: str, batch: tuple[Tensor, Tensor]) -> Callable[[], object]:
    """Returns a function that runs one pass of a variant."""
    if what == "forward":

        def run() -> None:
            with torch.no_grad():
                _forward(one, batch, "cuda")

        return run
    optimizer = torch.optim.AdamW(one.model.parameters(), fused=True) if what == "step" else None

    def step() -> None:
        _loss(_forward(one, batch, "cuda")).backward()
        if optimizer is not None:
            optimizer.step()
        one.model.zero_grad(set_to_none=True)

    return step


def _time(
    found: dict[str, Any],
    console: Console,
    variants: Sequence[Variant],
    batch: tuple[Tensor, Tensor],
    args: argparse.Namespace,
) -> None:
    """Times all variants in alternation, for each pass."""
    clips = len(batch[0])
    model = variants[-1].model
    assert isinstance(model, AVModel)
    peak = peak_flops(torch.cuda.get_device_name())
    for what, times in zip(PASSES, (1, 3, 3), strict=True):
        table = Table(title=f"{what}, {clips} clips")
        for column in ("", "ms", "clips/s", "MFU %", "peak GiB without parameters and optimizer"):
            table.add_column(column, justify="right" if column else "left")
        turns, memory = {}, {}
        for one in variants:
            run = _runner(one, what, batch)
            turns[one.name] = timed(run)
            before = torch.cuda.memory_allocated()  # of all variants, including optimizer state
            torch.cuda.reset_peak_memory_stats()
            run()
            torch.cuda.synchronize()
            memory[one.name] = (torch.cuda.max_memory_allocated() - before) / 2**30
        made = interleave(turns, args.rounds)
        rates = {name: per_second(one) * clips for name, one in made.items()}
        for name, rate in rates.items():
            speed = median(rate)
            mfu = 100 * speed.median * times * model.flops() / peak if peak else float("nan")
            ms = clips / speed.median * 1e3
            table.add_row(name, f"{ms:.1f}", str(speed), f"{mfu:.1f}", f"{memory[name]:.1f}")
            results.summarise(found, name, f"{what}: clips_per_s", speed)
            found["runs"].append(
                {"variant": name, "repeat": 0, "pass": what, "mfu_pct": mfu, "peak_gib": round(memory[name], 2)}
            )
        for a, b in itertools.permutations(rates, 2):
            if a.startswith("ours") or b == _BASELINE:
                interval = paired_ratio(rates[a], rates[b])
                results.judge(found, a, b, f"{what}: clips_per_s", interval)
        console.print(table)
        results.write(found, args.out)  # the plot is written at the end
