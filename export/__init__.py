"""PyTorch experts to verified ONNX bundles, and how the shipped ones were taught; the only room with torch."""
