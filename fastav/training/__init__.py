"""What a training run is made of: its state, inputs, ranks, folder, checkpoints and throughput."""
