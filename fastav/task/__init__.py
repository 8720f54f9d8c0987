"""Classification tasks: loss, metrics, and files of predictions."""
