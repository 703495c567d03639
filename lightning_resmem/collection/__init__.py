"""The memory pass: every training row exactly once, over all ranks.

In come the training loaders of a Trainer; out come chunks of embeddings, outputs, targets and ids. `samplers` and
`loaders` say which rows there are and how a rank reads its part, `memory_pass` reads it, `ranks` has all ranks agree.
"""
