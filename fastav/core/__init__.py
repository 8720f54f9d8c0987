"""Shared by all other packages: errors, config base, command-line runner, console, atomic files, process pool."""
