"""Switches of JAX, XLA, cuDNN and malloc that a program sets, and files written whole."""
