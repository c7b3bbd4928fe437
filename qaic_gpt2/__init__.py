import os

os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")  # before its import: on Linux too onnxruntime reports to its makers
