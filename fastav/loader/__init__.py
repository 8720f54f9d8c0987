"""Loader: reads, decodes and collates the batches of a plan ahead of the training step."""
