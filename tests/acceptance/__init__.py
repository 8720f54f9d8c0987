"""The long checks: `make acceptance` runs them one by one and writes a JSON file a row; a row that passed is not run again."""
