"""Rows and plans: what a clip is, which clips come when, and what is read of each. Nothing here imports torch."""
