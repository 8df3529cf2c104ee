"""Command lines of all three packages: groups, outcomes, settings, and how names and numbers are shown."""
