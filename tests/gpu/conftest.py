"""These tests are collected where there is a CUDA device, and nowhere else."""

import torch

collect_ignore_glob = [] if torch.cuda.is_available() else ["test_*.py"]
