"""Memories on disk.

`disk` writes and reads directories of tensors with a manifest and checksums, `tensor_file` one tensor of them; `saved`
says what a manifest stands for.
"""
