"""Manifests: one row per clip, as a Parquet file with a memory-mapped Arrow copy beside it.

The Parquet file is the manifest. Its plain columns are named as in `Clip` and can be read and written by any tool.
Its schema metadata hold the class names, the schema version and the row range of each split. The Arrow IPC file of
the same stem is a copy for random access to rows. See `store` for the copy, `window` for reading, `write` for writing
and merging, and `check` for validation.
"""

from fastav.data.manifest.check import Problem as Problem
from fastav.data.manifest.check import check as check
from fastav.data.manifest.reader import Manifest as Manifest
from fastav.data.manifest.store import SCHEMA as SCHEMA
from fastav.data.manifest.store import SCHEMA_VERSION as SCHEMA_VERSION
from fastav.data.manifest.write import Extent as Extent
from fastav.data.manifest.write import clips_table as clips_table
from fastav.data.manifest.write import merge as merge
from fastav.data.manifest.write import write_manifest as write_manifest
from fastav.data.manifest.write import write_table as write_table
