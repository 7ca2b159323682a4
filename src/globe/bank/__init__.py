"""A learned bank: its record, its file, and the matrices it stands for."""
