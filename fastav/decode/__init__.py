"""From media files to tensors: what a file really holds (`probe`), and a clip's planned frames and windows.

`DecoderConfig` is the registry: `[decoder] kind = "pyav"` in a recipe picks it.
"""

from fastav.decode.base import Decoder as Decoder
from fastav.decode.base import Read as Read
from fastav.decode.pyav import PyAV as PyAV

DecoderConfig = PyAV
