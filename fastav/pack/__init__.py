"""Transcodes clips once into shards that decode many times faster than the original media."""
