"""The time of a step: its work by kind, the hardware's rates, the fitted law."""
