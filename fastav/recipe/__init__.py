"""Recipes: every key, how files and overrides become one, and what each key means."""
