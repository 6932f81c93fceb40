"""Brings experts to a device and runs them there: memory for segments, sessions, loaders, executors."""
