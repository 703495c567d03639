"""A memory over a Ray cluster: `RayMemory`, and all that knows Ray.

In come the rows of all ranks; out come the answers that a `LocalMemory` would give.

What users see: `memory`; below it `sharded_memory`, the shards and what processes agree on (`ranks`), `merging`, their
answers put together, and `files`, rows to disk and back. How a process gets there: `client`, which finds a cluster
(`connecting`, `address`) and starts a `pool` on it (`placement`). Questions to all shards: `requests`; one that is dead
is noticed there, and remembered in `liveness`; `building` has all of them build. What runs in an actor: `shard`, with
its rows and changes in `durable`, on disk by `journal`, and its `meters`. Which rows are whose: `sharding`. What a pool
is made with, checked: `config`; what is left of one on disk: `abandoned`.
"""
