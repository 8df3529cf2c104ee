"""A trained model in use: predict, evaluate and export."""
