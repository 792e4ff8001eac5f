"""The device of the tests that need a GPU, and how they are rehearsed where there is none.

    pytest -m gpu                    on cuda:0; skipped where there is no GPU
    ACCELERATOR=cpu pytest -m gpu    the same tests with the CPU in the GPU's place

A rehearsal shows that the tests themselves work. What only a GPU has (names of kernels, waiting
for the device, float16 by autocast) it leaves out or replaces, where a test says so.
"""

import os

import pytest
import torch


@pytest.fixture(scope="session", autouse=True)
def accelerator() -> torch.device:
    """cuda:0; the CPU in a rehearsal."""
    if os.environ.get("ACCELERATOR", "cuda") == "cpu":
        return torch.device("cpu")
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device (ACCELERATOR=cpu rehearses it without)")
    return torch.device("cuda", 0)
