"""What the model predicts: loss, metrics, and the files of predictions."""
