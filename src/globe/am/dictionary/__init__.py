"""The dictionary step: projected Gauss-Newton (the default), and MOD with its targets."""
