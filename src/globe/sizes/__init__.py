"""Which sizes fill a budget, what they cost, and the dry run."""
