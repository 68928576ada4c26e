"""Slicing: each layer as wide as its redundancy allows."""
