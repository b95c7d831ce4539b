"""Video folders to batches: what is found, decoded, encoded once and kept, and the order in which it is trained on."""
