"""The folder of a run, its summary and its trackers."""
