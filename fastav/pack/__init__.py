"""Transcodes clips once into shards that decode many times faster."""
