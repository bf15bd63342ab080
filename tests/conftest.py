"""The environment of every test process, set before any heavy library is imported."""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("WANDB_MODE", "offline")
os.environ.setdefault(
    "TRITON_INTERPRET", "1"
)  # before any import of triton; gpu tests: TRITON_INTERPRET=0 pytest -m gpu
os.environ.setdefault("DS_ACCELERATOR", "cpu")  # the rank pools are CPU; gpu tests set their own
