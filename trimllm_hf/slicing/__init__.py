"""Slicing: reduces the width of each layer according to its redundancy."""
