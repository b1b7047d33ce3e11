"""Measures a run: memory by phase, step time, energy, checkpoint bytes, environment; and keeps the table of measured runs."""
