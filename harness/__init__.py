"""Runs real training: models, data, the loop, one profiled point, sweeps of points, and the full fine-tune."""
