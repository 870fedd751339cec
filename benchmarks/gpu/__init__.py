"""A report of one GPU in a few minutes. Each section is a module with a function `run` and runs in its own process."""
