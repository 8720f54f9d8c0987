"""The verbs of the command line, one file each: options in, exit code out; the work is done in the other rooms."""
