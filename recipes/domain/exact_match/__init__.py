"""An `evaluate` metric that loads offline: the module of the same name beside this file."""
