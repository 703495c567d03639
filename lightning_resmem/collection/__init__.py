"""The memory pass: every training row exactly once, over all ranks.

In come the training loaders of a Trainer; out come chunks of embeddings, outputs, targets and ids. `samplers`,
`repeats` and `loaders` say which rows there are, `parts` how a rank reads its part. `memory_pass` reads it, `chunks`
hands the rows on without those that are NaN, `rehearsal` says what two readings before training show, and `ranks` has
all ranks agree.
"""
