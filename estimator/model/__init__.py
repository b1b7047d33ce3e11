"""The model: its shape from a catalog, a config or a count of parameters."""
