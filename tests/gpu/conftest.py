"""Emit torch's once-per-process warnings on a GPU before a test turns them into errors."""

from __future__ import annotations

import warnings

import pytest
import torch


@pytest.fixture(scope="session", autouse=True)
def warnings_before_tests():
    with warnings.catch_warnings():
        # torch 2.11 to 2.13: the check for host syncs is a prototype
        warnings.filterwarnings("ignore", "Synchronization debug mode is a prototype feature", UserWarning)
        torch.cuda.set_sync_debug_mode("default")
