"""What a checkpoint or a run holds, as plain records and as tables."""
