"""Measured latency: how fast a model is, beside its base, what it weighs, and how near the limit that is."""
