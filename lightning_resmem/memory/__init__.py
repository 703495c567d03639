"""The memory: rows are added, searched, summed up, saved.

In come embeddings, outputs, targets and ids; out come neighbours, residual sums and combined predictions.
`ResidualMemory` is the interface of all memories, `LocalMemory` the one in this process. A subclass of
`ResidualMemory` stores or searches rows in another way.
"""
