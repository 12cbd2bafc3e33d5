"""The view over ``onnx_ir`` models."""
