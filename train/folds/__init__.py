"""Cross-validation by scene, and a list of labels that it finds doubtful."""
