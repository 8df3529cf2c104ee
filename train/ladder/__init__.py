"""`python -m train ladder`: rung after rung on one split, one table."""
