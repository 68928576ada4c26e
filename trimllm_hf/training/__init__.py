"""Training: the settings, `TrimCallback`, `TrimTrainer`, and the selection of layers and drop times."""
