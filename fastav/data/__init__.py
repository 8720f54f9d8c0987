"""Rows and plans: what a clip is, in which order clips are visited and what is read from each. Imports no torch."""
