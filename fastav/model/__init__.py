"""The model: towers, their fusion, and their weights."""
