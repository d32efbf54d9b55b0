"""Triton's own tests are collected where it is installed: it exists for Linux alone."""

import importlib.util

collect_ignore_glob = [] if importlib.util.find_spec("triton") else ["test_triton_*.py"]
