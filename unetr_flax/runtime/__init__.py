"""Switches of JAX, XLA, cuDNN and malloc that a program sets and a library leaves alone."""
