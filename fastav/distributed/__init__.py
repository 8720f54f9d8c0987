"""Training on several processes: strategies (DDP, FSDP2, ZeRO), the launcher, and the logs of the ranks."""
