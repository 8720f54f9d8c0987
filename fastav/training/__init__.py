"""Parts of a training run: its state, inputs, ranks, run folder, checkpoints and throughput meter."""
