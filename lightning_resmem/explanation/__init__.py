"""Why a prediction changed, and which rows of a memory matter.

In comes a filled memory with queries; out come the neighbours behind each prediction, the influence of a row, and rows
that are probably mislabelled.
"""
