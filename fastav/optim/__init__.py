"""Optimizer, schedules, weight averages, and the watch over the loss."""
