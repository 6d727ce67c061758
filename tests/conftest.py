"""Settings for all tests: Triton kernels run in its interpreter where there is no GPU; `support` can be imported."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch

for folder in ("", "kernels"):  # import-mode=importlib does not do it
    sys.path.insert(0, str(Path(__file__).parent / folder))

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when triton is first imported
torch.set_num_threads(1)  # tests run on several processes, and their tensors are small
