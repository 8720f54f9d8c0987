"""Data sets: one file each, from its published files to unprobed clips. Probing them is `fastav index`'s work.

A data set's module has `add_arguments(parser)` for its own options and `listing(args) -> Listing`; its line in
`fastav.datasets.registry.DATASETS` gives it its word on the command line.
"""
