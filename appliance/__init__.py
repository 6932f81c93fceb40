"""An ONNX Runtime edge appliance: hundreds of expert networks served by one box beside a production line."""

import os

# Linux wheels of ONNX Runtime since 1.29 report usage to their maker unless told not to before the first import.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

__version__ = "0.1.0"
