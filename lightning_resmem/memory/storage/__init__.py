"""Memories on disk.

`disk` writes and reads a memory as files with a `manifest`: in a `directory` here, or copied to and from a URL by
`remote` (`paths` tells them apart). `tensor_file` has one tensor, `files` what is common to all files. `saved` says
what a manifest stands for, `contents` whether its rows can be.
"""
