"""Run directories and what lies in them."""
