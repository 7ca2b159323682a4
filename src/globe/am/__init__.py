"""The method: alternating minimisation of codes, bank and adapters."""
