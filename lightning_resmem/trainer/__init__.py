"""What is asked of a Lightning Trainer: where a memory is saved, which weights it holds, how many batches are read.

In comes a Trainer with its settings; out come paths, weights, limits and a memory that is found again. `save_directory`
says where a callback saves, `restoring` how a checkpoint or a new process finds the memory there, `weights` which
weights are memorized, `loaders` and `limits` which rows and how many batches, `processes` and `job` where work runs. A
new option of the Trainer that the memory pass has to heed belongs here.
"""
