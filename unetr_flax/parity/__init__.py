"""The port against its PyTorch original, number by number. Needs torch, so nothing imports it."""
