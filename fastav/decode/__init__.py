"""From media files to tensors: what a file really holds (`probe`), and the planned frames and windows of a clip."""
