"""What doctests cannot import on this machine."""

import importlib.util

collect_ignore = [] if importlib.util.find_spec("triton") else ["lightning_resmem/memory/search/kernels.py"]
