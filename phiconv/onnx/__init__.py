"""ONNX: graph construction, lazy rewrites, and the writer of model and external data."""
