"""What both environments agree on."""

PROMPTS = [[5, 77, 301, 12], [900, 4, 4, 31, 8], [60, 61, 62], [1500, 3, 17, 99, 250, 41]]
NEW_TOKENS = 16
