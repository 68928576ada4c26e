"""A finished model into the world: measured latency, the card with its pictures, the push, exports to other runtimes."""
