"""Training: the settings, `TrimCallback`, `TrimTrainer`, and what decides when and which layers go."""
