"""Choosing the params of a memory on validation rows.

In come embeddings, outputs and targets of rows that were not trained on; out comes a `TuningResult`. `tuner` holds
`GridTuner`, `sweep` and `grid` what it does; to choose in another way, subclass `Tuner`.
"""
