"""Predicts memory, time, checkpoint bytes and cost of a fine-tune from a model's shape and a training setup.

The lowest room: imports nothing of the others, and no torch, pandas, scipy or matplotlib at import time.
"""
