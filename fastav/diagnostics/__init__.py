"""Measures this machine and the other ranks' devices and network."""
