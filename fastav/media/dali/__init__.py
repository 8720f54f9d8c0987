"""Decoding on the GPU (or the CPU) by NVIDIA DALI."""
