"""GloBE."""
