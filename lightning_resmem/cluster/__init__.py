"""A memory over a Ray cluster: `RayMemory`, and all that knows Ray.

In come the rows of all ranks; out come the answers that a `LocalMemory` would give. `memory` is what users see,
`client` how a process reaches the pool, `pool` the actors and what is known of them, `requests` a question to all,
`shard` what runs in an actor, `journal` how it keeps its rows, `sharding` which rows are whose.
"""
