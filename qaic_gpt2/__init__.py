import os

os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")  # before the import of onnxruntime, which sends it on Linux too
