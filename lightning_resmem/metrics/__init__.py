"""Base, knn and resmem side by side.

In come predictions and targets; out come scores, flips, calibration and neighbourhoods. `functional` has the maths,
`side_by_side` the torchmetrics twins, `scoreboard` counts a run, and `evaluation` is what the run showed.
"""
