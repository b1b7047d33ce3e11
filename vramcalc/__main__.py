"""``python -m vramcalc``."""

from vramcalc.main import run

run()
