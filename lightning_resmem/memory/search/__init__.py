"""The nearest keys of a query: exactly, on any device, or approximately with FAISS.

In come keys `(N, D)` and queries `(B, D)`; out come Euclidean distances and positions `(B, k)`. `exact` compares all
keys: in float32 by `precise`, after `rough` and `fused` on CPUs and `groups` and `kernels` on GPUs have answered what
half precision suffices for. `faiss_index` says which index of FAISS is built, `faiss_limits` which cannot be, and
`faiss_search` builds and searches it.
"""
