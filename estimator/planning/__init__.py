"""Searching the settings that nobody gave: the space, its layouts, the front of time against money, the largest that fits."""
