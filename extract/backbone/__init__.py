"""The frozen backbone: checkpoint, model, precision, transform, embedding and provenance."""
