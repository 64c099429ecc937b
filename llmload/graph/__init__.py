"""ONNX graphs of GPT-2, written node by node instead of exported from a framework."""
