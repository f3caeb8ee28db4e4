"""Models as programs for other software: StableHLO for JAX without Flax, and ONNX."""
