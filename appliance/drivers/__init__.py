"""Touches the world: broker, disk, ONNX Runtime, operating system. Obeys actions and reports events."""
