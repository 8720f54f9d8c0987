"""From the plan to batches: reads, decodes and collates ahead of the training step."""
