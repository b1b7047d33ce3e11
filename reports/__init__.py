"""Renders results for people and programs: terminal, JSON and HTML. Pure functions of data; scales units, computes nothing else."""
