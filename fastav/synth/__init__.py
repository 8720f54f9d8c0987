"""The made data set: real media files on which only fusion can win."""
