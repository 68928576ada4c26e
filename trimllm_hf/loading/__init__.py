"""Reading and writing checkpoints: loading only the kept layers of a base, trimming like a checkpoint, the Auto classes."""
