"""The arithmetic that every kernel shares: float64, chunks of experts, process groups, activations, error figures, devices and memory."""
