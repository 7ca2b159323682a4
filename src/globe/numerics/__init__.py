"""The arithmetic that every kernel shares: float64, chunks of experts, process groups, error figures, devices."""
