"""What people look at: summaries, loggers, Weights & Biases, plots, the HTML report.

In comes what memorizing and evaluating found; nothing that is computed depends on this package. `report` says what is
told when, `html_report` writes the page about a saved memory.
"""
