"""Facts as data files, a source in every row."""
