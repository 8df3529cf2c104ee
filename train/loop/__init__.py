"""One training: assembled, stepped, validated and saved."""
