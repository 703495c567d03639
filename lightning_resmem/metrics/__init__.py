"""Base, knn and resmem side by side.

In come predictions and targets; out come scores, flips, calibration and neighbourhoods. `functional` and `bins` have
the maths, `sums` and `binned` the torchmetrics twins, `side_by_side` all of them as one metric (`reported` says which);
`scoreboard` counts a run, `evaluation` is what the run showed, and `run` what lies between.
"""
