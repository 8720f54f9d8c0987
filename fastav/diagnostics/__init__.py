"""Diagnostics: properties of this machine, and tests of every rank's device and network."""
