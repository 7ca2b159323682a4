"""What a model or a run holds, from its headers and records."""
