"""Decides. No clock, no lock, no log, no I/O: events and `now` in, actions out."""
