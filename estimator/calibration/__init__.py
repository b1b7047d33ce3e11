"""Scaling the formulas to a device from runs measured on it."""
