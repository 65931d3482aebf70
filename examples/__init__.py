"""Transformers of every kind, each on plain PyTorch attention and on fastattn, side by side. README.md lists them."""
