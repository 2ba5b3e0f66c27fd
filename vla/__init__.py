"""The policy, its training and its evaluation on one or more ranks. Nothing here depends on a simulator."""

import os
from pathlib import Path

import torch

VERSION = "0.3.0"  # the newest heading of CHANGELOG.md, shown by doctor.py, run folders and checkpoints
ROOT = Path(__file__).resolve().parent.parent  # of the repository

if not torch.cuda.is_available():  # set before DeepSpeed is imported, or every rank warns that it found no GPU
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
