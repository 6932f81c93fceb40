"""Touches the world: broker, spool and records, pictures, ONNX Runtime, operating system."""
