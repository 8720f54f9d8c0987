"""Recipes: the schema of all keys, the parser that merges files and overrides, and the explanation of each key."""
