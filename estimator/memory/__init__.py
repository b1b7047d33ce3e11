"""The memory formula, by what its modules know; ``formula`` is its entry."""
