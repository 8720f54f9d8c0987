"""Optimizer, learning-rate schedules, averaged weights (EMA), and the loss guard."""
