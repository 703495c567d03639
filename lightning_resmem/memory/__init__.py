"""The memory: rows are added, searched, summed up, saved.

In come embeddings, outputs, targets and ids; out come neighbours, residual sums and combined predictions.
`ResidualMemory` is the interface of all memories, `LocalMemory` the one in this process: `local_config` says what kind
it is, `rows` holds what it has, and `row_ids` knows where each row is. A subclass of `ResidualMemory` stores or
searches rows in another way.
"""
