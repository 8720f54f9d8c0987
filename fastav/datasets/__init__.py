"""Data sets: one module each, which turns the published files into a list of unprobed clips for `fastav index`.

The module of a data set has `add_arguments(parser)` for its own options and `list_clips(args) -> ClipList`. A line in
`fastav.datasets.registry.DATASETS` gives it a name on the command line. Its docstring is the text of
`fastav index NAME --help`.
"""
