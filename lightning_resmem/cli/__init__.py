"""The command `resmem`, for those who work from a shell.

In come its arguments, out come an exit status and files. `main` finds the command; `options` says what each takes,
without Lightning or torch, so that `--help` answers at once; `training` makes the commands of LightningCLI, and `saved`
those that read a saved memory alone.
"""
