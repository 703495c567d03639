"""The user's network: its head, its batches, its modes, its weights.

In comes a trained LightningModule and a batch; out come the embedding and the output of its head. A `HeadTap` reads
what goes through the head or replaces what comes out of it; `BatchReader` finds inputs, targets and ids in a batch.
To change what is read of a batch, give `targets_fn`, `forward_fn` or `ids_fn`.
"""
