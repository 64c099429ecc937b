"""Run the ONNX graphs of a model on this device. Everything here blocks: call it in a thread."""
