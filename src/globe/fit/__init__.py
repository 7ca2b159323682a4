"""One bank from experts to file: plan, read, normalise, fit, finalise, write, resume."""
