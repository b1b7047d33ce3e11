"""From a step to a whole run: wall time, money and energy."""
