"""Whether an extraction and the training after it can work, and what it would take: said in seconds, before an hour is
spent."""
