"""Measures and searches. The service never imports it."""
