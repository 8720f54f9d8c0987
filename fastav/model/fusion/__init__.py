"""Fusion kinds: how the video and the audio tower are combined into logits.

A fusion consists of two classes:

* A config, a subclass of `FusionKind` (kind.py, which holds a complete example). Its fields are the keys under
  `model.fusion` of a recipe. Its `build` receives both towers, may change them, and returns the module.
* A module, a `torch.nn.Module` with the fusion's own parameters and the two methods described below.

Where it goes: in this project, one file in this folder and a line in the union `Fusion` below. Outside the project, any
importable module: a recipe names the config as `kind = "my_package.my_module:MyFusion"`, and nothing here is edited.

The module's methods:

    forward(video, audio, inputs) -> Tensor
        video, audio    The towers (`fastav.model.tower.Tower`) as `build` left them; None for a modality that
                        `FusionKind.modalities` leaves out. They are passed in, so the module does not store them.
        inputs          `FusionInputs`: the normalised, augmented frames and spectrogram windows of B clips.
        returns         Logits [B, K]. In training [B, M, K] is allowed, too: the loss is then the mean of M losses.

    flops(video, audio, frames, windows) -> int
        Floating point operations of one clip with that many frames and audio windows (a multiply-add counts as two),
        from the towers' `feature_flops`, `head_flops`, ... and from `linear_flops` and `block_flops`.

What `forward` must handle:

* Windows. Training has W = 1 audio window per clip, evaluation W of them. Compute what depends only on frames once per
  clip, the rest once per window, and average with `mean_over_windows`, which ignores windows that are padding.
* Missing modalities. `has_video_B` and `has_audio_B` are masks; None means that every clip has the modality. A clip's
  logits must not depend on the content of a modality that it lacks. Use masks, not Python branches on tensor values:
  the model is compiled and exported as one graph. `mean_over_modalities`, `concat_features` and `key_mask` do this.
* Stochastic depth is drawn per clip. `tower.features(images, rows_per_clip)` handles it; call
  `tower.rows_per_clip(n)` before running `tower.blocks` directly.

What the module's parameters must satisfy:

* Every trainable parameter takes part in every forward pass: distributed training waits for the gradient of each.
* A classification layer is an attribute named `head`, so that `model.init_from` can skip it where the classes differ.
* Weight decay leaves out parameters with one axis (biases, norms) and embedding tables, which it knows by the end of
  their name: `pos_embed`, `position`, `token`, `tokens`, `bottleneck`, `time_embed`. List the names of further ones in
  an attribute `decay_free`.

Ready-made parts are in inputs.py (features of each tower, means, masks, layers) and in
`fastav.model.bottleneck_block` (transformer blocks with bottleneck tokens). late.py is the shortest kind to copy.
"""

from __future__ import annotations

from fastav.model.fusion.bottleneck import Bottleneck
from fastav.model.fusion.early import Early
from fastav.model.fusion.external import ExternalFusion
from fastav.model.fusion.inputs import FusionInputs, mean_over_windows
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
    "mean_over_windows",
]

Fusion = Video | Audio | Score | Late | Early | Bottleneck | MBT | ExternalFusion
"""All fusion kinds, in the order in which reports list them."""
