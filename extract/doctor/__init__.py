"""Check in seconds whether an extraction and the training after it can work, and estimate time and cost."""
