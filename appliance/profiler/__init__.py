"""Measures a box while it serves nobody, and finds the settings that serve its experts best."""
