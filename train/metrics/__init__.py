"""Score a model: figures, decisions, intervals and baselines."""
