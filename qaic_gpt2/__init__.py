"""GPT-2 through QEfficient's workflow.

from qaic_gpt2 import QEFFAutoModelForCausalLM     # QEfficient's if a card is ready, else the one of auto_model.py
"""

import os

os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")  # before the import of onnxruntime, which sends it on Linux too


def __getattr__(name: str):
    if name == "QEFFAutoModelForCausalLM":
        from qaic_gpt2 import backend

        return backend.choose()
    raise AttributeError(f"module {__name__} has no attribute {name!r}")
