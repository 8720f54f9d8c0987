"""From media files to frames and spectrograms: opening, probing, decoding, shards."""
