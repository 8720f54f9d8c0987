"""The verbs of the command line, one module each: parse the options, call the other packages, return the exit code."""
