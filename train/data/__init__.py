"""What a classifier is trained on: labels, split, vectors and batches."""
