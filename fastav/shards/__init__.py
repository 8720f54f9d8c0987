"""Shards: tar files of packed clips, the splice that reads just what a plan needs of them, and where they are read."""

from fastav.shards.layout import FLAC_BLOCK as FLAC_BLOCK
from fastav.shards.splice import Packed as Packed
from fastav.shards.splice import Shards as Shards
from fastav.shards.splice import SplicedFrames as SplicedFrames
from fastav.shards.splice import SplicedSound as SplicedSound
from fastav.shards.store import Reading as Reading
from fastav.shards.store import Traffic as Traffic
