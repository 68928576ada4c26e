"""What reads and writes checkpoints: the kept layers of a base, a base trimmed like a checkpoint, the Auto classes."""
