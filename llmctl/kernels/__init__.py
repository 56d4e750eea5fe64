"""Tensors in, tensors out. Every fast path has a plain reference beside it, and a test between them."""
