"""What every room uses: errors, config base, command-line runner, console, atomic files, process pool, machine."""
