"""The deployed graph with its state on the device of an ONNX Runtime provider: for the examples that measure GPUs.

A cache is one buffer that is read and written, a recurrent state two that take turns, as in our own sessions, which run
on the CPU.
"""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

CUDA, CPU = "CUDAExecutionProvider", "CPUExecutionProvider"
_TYPES = {"tensor(float)": np.float32, "tensor(float16)": np.float16}


class DeviceSession:
    """B rows of a batch, T new tokens. Ends the program where the provider or the model cannot be used.

    capacity: slots of a cache, at most and by default as many as the model's context.
    """

    def __init__(
        self, folder: Path, provider: str, *, capacity: int | None = None, profile_prefix: str | None = None
    ) -> None:
        options = ort.SessionOptions()
        options.log_severity_level = 3
        options.intra_op_num_threads = 1
        if profile_prefix is not None:
            options.enable_profiling, options.profile_file_prefix = True, profile_prefix
        if provider == CUDA:
            ort.preload_dlls()  # CUDA and cuDNN from pip's packages, where no system has them
        names = [provider] if provider == CPU else [(provider, {"use_tf32": 0} if provider == CUDA else {}), CPU]
        self.session = ort.InferenceSession(str(folder / "model.onnx"), options, providers=names)
        if self.session.get_providers()[0] != provider:
            sys.exit(f"{provider} cannot be used here; available: {ort.get_available_providers()}")
        self.device = "cuda" if provider == CUDA else "cpu"
        config = json.loads((folder / "genai_config.json").read_text(encoding="utf-8"))
        states = [i for i in self.session.get_inputs() if i.name.startswith("past_key_values.")]
        self._inputs = {i.name: (i.shape[1:], _TYPES[i.type]) for i in states}
        self._caches = {i.name for i in states if "past_sequence" in i.shape}
        if not config["search"]["past_present_share_buffer"] and self._caches:
            sys.exit(f"{folder}: its caches grow, which this script does not follow")
        self.capacity = min(capacity or math.inf, int(config["model"]["context_length"]))
        self.reset()

    def reset(self, *, batch: int = 1, behind: int = 0, fill: float = 0.0) -> None:
        """Empty, or as behind so many tokens, all of whose states and keys are one number."""
        self.length, self.batch, self.state, self.spare = behind, batch, {}, {}
        for name, (shape, dtype) in self._inputs.items():
            sizes = [batch, *(d if isinstance(d, int) else self.capacity for d in shape)]
            self.state[name] = self._value(np.full(sizes, fill, dtype))
            own = name not in self._caches
            self.spare[name] = self._value(np.zeros(sizes, dtype)) if own else self.state[name]

    def _value(self, array: NDArray[np.floating]) -> ort.OrtValue:
        return ort.OrtValue.ortvalue_from_numpy(array, self.device, 0)

    def bytes_behind(self, batch: int, length: int, *, recurrent: int = 1) -> int:
        """Bytes of what is remembered of so many tokens a row, recurrent states counted so many times."""
        return batch * sum(
            (recurrent if name.endswith(".recurrent_state") else 1)
            * math.prod(d if isinstance(d, int) else length for d in shape)
            * np.dtype(dtype).itemsize
            for name, (shape, dtype) in self._inputs.items()
        )

    def forward(self, ids: NDArray[np.int64]) -> ort.OrtValue:
        """Logits [B, T, V] on the device behind ids [B, T], once they are computed."""
        self.length += ids.shape[1]
        binding = self.session.io_binding()
        binding.bind_output("logits", self.device)
        binding.bind_cpu_input("input_ids", ids)
        binding.bind_cpu_input("attention_mask", np.ones((self.batch, self.length), np.int64))
        for name in self.state:
            binding.bind_ortvalue_input(name, self.state[name])
            binding.bind_ortvalue_output(name.replace("past_key_values", "present"), self.spare[name])
        self.session.run_with_iobinding(binding)
        self.state, self.spare = self.spare, self.state
        return binding.get_outputs()[0]
