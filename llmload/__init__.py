"""GPT-2 on ONNX Runtime, run and trained over the peers of a mesh.

The modules, from the inside out: `config`, `weights`, `tokenizer` (a model folder in Hugging Face
layout), `reference` (the model in NumPy: what is right), `graph` (the model as ONNX), `engine`
(ONNX graphs running on this device).
"""
