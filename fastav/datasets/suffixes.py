"""File name suffixes of videos and recordings, in lower case and with the dot."""

VIDEO_SUFFIXES = frozenset((
    ".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi", ".ts", ".mts", ".m2ts", ".mpg", ".mpeg", ".wmv", ".asf", ".flv",
    ".f4v", ".3gp", ".3g2", ".ogv", ".mxf", ".vob", ".y4m",
))  # fmt: skip
AUDIO_SUFFIXES = frozenset((
    ".wav", ".wave", ".flac", ".mp3", ".ogg", ".oga", ".opus", ".m4a", ".aac", ".aif", ".aiff", ".aifc", ".wma",
    ".ac3", ".au", ".caf", ".w64", ".mka",
))  # fmt: skip
