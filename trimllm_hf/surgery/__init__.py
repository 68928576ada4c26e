"""Surgery: takes layers out of a model and their traces out of its config, verified before anything changes."""
