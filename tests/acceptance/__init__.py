"""The long checks: `make acceptance` runs them one by one, writes a JSON file a row, and skips what has passed."""
