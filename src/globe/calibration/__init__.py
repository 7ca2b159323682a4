"""What a model's experts compute on a calibration text: second moments of their inputs, weights of their rows.

`statistics` has the record of a layer and its file, which the fits read.
"""
