"""The report of a run: its page, plots and clips."""
