"""What is said of a model: figures, decisions, intervals and baselines."""
