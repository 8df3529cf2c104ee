"""Cross-validation by scene, and the labels that it doubts."""
