"""More than one process: sweeps, forks and torchrun."""
