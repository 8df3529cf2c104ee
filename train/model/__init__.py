"""The classifier: head, loss, optimiser, augmentation and shards."""
