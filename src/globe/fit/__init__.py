"""One bank from experts to file: plan, read, normalise, fit, finalise, write, resume.

Called, `globe.fit(experts, kept=0.5)`, the room is `globe.sizes.interface.fit`.
"""
