"""From media to tensors: what a file really holds (`probe`), and a clip's planned frames and windows.

`DecoderConfig` is the registry: `kind` in `[decode]` of a recipe picks one; `auto` decides by what there is (`choice`).
"""

from fastav.decode.base import BatchDecoder as BatchDecoder
from fastav.decode.base import Decoder as Decoder
from fastav.decode.base import Read as Read
from fastav.decode.choice import Auto as Auto
from fastav.decode.choice import Census as Census
from fastav.decode.choice import Choice as Choice
from fastav.decode.choice import choose as choose
from fastav.decode.choice import sampled as sampled
from fastav.decode.dali import Dali as Dali
from fastav.decode.pyav import PyAV as PyAV

DecoderConfig = Auto | PyAV | Dali
