"""The policy, and what runs it on ranks. Knows no simulator."""

import os
from pathlib import Path

import torch

VERSION = "0.3.0"  # the newest heading of CHANGELOG.md; doctor.py, run folders and checkpoints show it
ROOT = Path(__file__).resolve().parent.parent  # of the repository

if not torch.cuda.is_available():  # before DeepSpeed is imported: else every rank warns that it found no GPU
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
