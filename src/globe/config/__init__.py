"""From what is typed to checked dataclasses; Hydra's errors become sentences."""
