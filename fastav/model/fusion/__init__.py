"""How the towers meet: one modality alone, late, score, early and bottleneck fusion.

Each kind is a config whose `build` prepares the towers (it may take blocks over or remove what it does not
use) and returns a module with the fusion's own parameters and

    forward(video, audio, streams) -> logits [B, K]        flops(video, audio, frames, windows) -> int

Evaluation gives W windows of sound for one clip: what only depends on the frames runs once per clip, the rest
once per window, and the logits are averaged over the real windows. A missing modality is a mask, never a
branch: with both present in all clips the masks may be None.
"""

from __future__ import annotations

from fastav.model.fusion.bottleneck import Bottleneck
from fastav.model.fusion.early import Early
from fastav.model.fusion.external import ExternalFusion
from fastav.model.fusion.inputs import FusionInputs, over_windows
from fastav.model.fusion.late import Late
from fastav.model.fusion.mbt import MBT
from fastav.model.fusion.score import Score
from fastav.model.fusion.single import Audio, Video

__all__ = [
    "MBT",
    "Audio",
    "Bottleneck",
    "Early",
    "ExternalFusion",
    "Fusion",
    "FusionInputs",
    "Late",
    "Score",
    "Video",
    "over_windows",
]

Fusion = Video | Audio | Late | Score | Early | Bottleneck | MBT | ExternalFusion
