"""Sections of the settings; asyncgrpo/config.py makes the whole of them."""
