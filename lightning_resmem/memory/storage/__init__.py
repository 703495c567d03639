"""Memories on disk.

`disk` writes and reads directories of tensors with a manifest and checksums; `saved` says what a manifest stands for.
"""
