"""What is kept of a row besides its key, and the weighted sums of residuals and labels.

In come outputs and targets; out come sums over found positions. `interface` is what all kinds have in common; `dense`
keeps outputs in full, `sparse` the largest probabilities of many classes.
"""
