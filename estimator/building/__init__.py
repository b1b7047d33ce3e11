"""Models for real: a transformers model from its config, its adapters and quantized weights."""
