"""The synthetic data set: mp4 files that can only be classified from video and audio together."""
