"""`python -m train sweep`: heads of many settings trained together."""
