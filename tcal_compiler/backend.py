"""The torch.compile backend "tcal": a compiled teacher answers with its student's logits. Inference only.

    torch.compile(model, backend="tcal", options={"student": "run/"})
    torch.compile(model, backend="tcal", options={"policy": "uniform:25%", "calibrate": [ids, ...]})

What happens. Dynamo traces the teacher's forward and hands its graph over; `read_call` finds in it the module that is
called and the arguments of the call. When the call runs for the first time, the module is captured and checked as in a
conversion, and the student is made on that capture: from a run folder or by calibration. Dynamo's own graph runs once,
to see that the call returns the captured teacher's logits. From then on the student runs, compiled with dynamic shapes
as one graph, which Dynamo's graphs for other lengths share.

Errors come from the call, as TcalError: an error raised inside a backend is wrapped by Dynamo.
"""

from __future__ import annotations

import difflib
import os
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from pydantic import ConfigDict, ValidationError
from torch import Tensor, nn
from torch.fx import GraphModule

from .dynamo_call import WHERE, Call, read_call
from .errors import ConfigError, TcalError, UnsupportedModelError
from .passes.graph import move_to
from .passes.types import Capture
from .run_models import student_of_run
from .runtime.config import LOCAL_WINDOW, AlignConfig, InitName, LocalWindow, StrictModel
from .runtime.live import WHERE as MODEL
from .runtime.live import device_of, student_of_batches

NAME = "tcal"
ANOTHER_FUNCTION = 1e-2  # of the largest logit: far above rounding and TF32, far below any other use of the logits


class BackendOptions(StrictModel):
    """options of torch.compile(..., backend="tcal"): either student, or policy and calibrate.

    Attributes:
        student: run folder of a conversion that is aligned; where it is distilled too, the distilled student runs.
        policy: which attention layers stay softmax, as for tcal-compile.
        calibrate: int64 token ids [B, T], all of one length T; the last eighth of the sequences only scores. Before a
            model is compiled with other ones, call torch._dynamo.reset(): torch cannot compare the two.
        init, local_window, seed, align: as in the configuration of a conversion. States learn from sequences that are
            longer than local_window.
        compiler: what compiles the student's graph. inductor_mode: the mode of torch.compile, for inductor.
    """

    model_config = ConfigDict(arbitrary_types_allowed=True)

    student: str | os.PathLike[str] | None = None
    policy: str | None = None
    calibrate: list[Tensor] | tuple[Tensor, ...] | None = None
    init: InitName = "closed-form"
    local_window: LocalWindow = LOCAL_WINDOW
    seed: int = 0
    align: AlignConfig = AlignConfig()
    compiler: Literal["inductor", "aot_eager", "eager"] = "inductor"
    inductor_mode: Literal["default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs"] = "default"

    def key(self) -> tuple[object, ...]:
        """Equal for options that ask for the same."""
        folder = os.path.abspath(self.student) if self.student is not None else None
        return folder, tuple(map(id, self.calibrate or ())), self.model_dump_json(exclude={"student", "calibrate"})


def read_options(options: dict[str, Any] | None, mode: str | None = None) -> BackendOptions:
    """Checked options. Raises ConfigError that names the option and what may stand there."""
    where = f"options of the backend {NAME}"
    names = list(BackendOptions.model_fields)
    if mode is not None:
        raise ConfigError(where, f"mode={mode!r} is given outside of options", f'options={{"inductor_mode": {mode!r}}}')
    try:
        found = BackendOptions.model_validate(options or {})
    except ValidationError as e:
        first = e.errors()[0]
        name = ".".join(str(p) for p in first["loc"])
        if first["type"] == "extra_forbidden":
            near = difflib.get_close_matches(name, names, 1)
            hint = f"did you mean {near[0]}?" if near else f"options are {', '.join(names)}"
            raise ConfigError(where, f"unknown option {name}", hint) from None
        what = f"{name} = {str(first['input'])[:80]!r}: {first['msg']}"
        raise ConfigError(where, what, "help(tcal_compiler.backend.BackendOptions)") from None
    if found.compiler != "inductor" and found.inductor_mode != "default":
        what = f"inductor_mode = {found.inductor_mode!r} is for inductor, but compiler = {found.compiler!r}"
        raise ConfigError(where, what, "one of the two")
    given = [n for n in ("student", "policy", "calibrate") if getattr(found, n) is not None]
    if given not in (["student"], ["policy", "calibrate"]):
        what = f"of student, policy and calibrate, {' and '.join(given) or 'none'} given"
        raise ConfigError(where, what, '{"student": run folder}, or {"policy": ..., "calibrate": [ids, ...]}')
    return found


@dataclass(frozen=True)
class Prepared:
    """What runs in place of a module.

    Attributes:
        capture: the module's own graph. forward: the student's, compiled, with the same arguments.
        versions: address -> weight of the module and its version when it was checked. Holding the weights keeps their
            addresses from being used again.
        options: held for the same reason.
    """

    capture: Capture
    forward: Callable[..., Tensor]
    versions: dict[int, tuple[Tensor, int]]
    options: BackendOptions

    def fits(self, weights: Sequence[Tensor]) -> bool:
        """Whether these are the weights that were checked, and not written to since."""
        nothing = (None, -1)
        return all(self.versions.get(w.data_ptr(), nothing)[1] == _version(w) for w in weights if w.numel())

    def holds(self, weights: Sequence[Tensor]) -> bool:
        """Whether these are weights of the module, written to since or not."""
        return all(w.data_ptr() in self.versions for w in weights if w.numel())

    def arguments(self, ids: Tensor, positions: Tensor | None) -> tuple[Tensor, ...]:
        """The graphs' arguments for a call."""
        return (ids, positions) if positions is not None and self.capture.has_positions else self.capture.inputs(ids)


_PREPARED: weakref.WeakKeyDictionary[nn.Module, dict[object, Prepared]] = weakref.WeakKeyDictionary()


def _version(tensor: Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version


def prepare(module: nn.Module, options: BackendOptions) -> Prepared:
    """Captures the module, makes its student and compiles that; the module stays as it is.

    Raises TcalError when the module cannot be converted or is not the run folder's teacher.
    """
    device = device_of(module)
    tensors = [*module.parameters(), *module.buffers()]
    versions = {t.data_ptr(): (t, _version(t)) for t in tensors if t.numel()}
    with torch.inference_mode(False), torch.enable_grad(), torch.autocast(device.type, enabled=False):
        with torch.random.fork_rng(
            devices=[]
        ):  # new layers take random numbers, which the user's program must not miss
            if options.student is not None:
                student = student_of_run(module, options.student)
            else:
                assert options.calibrate is not None and options.policy is not None
                student = student_of_batches(
                    module,
                    options.calibrate,
                    policy=options.policy,
                    init=options.init,
                    local_window=options.local_window,
                    seed=options.seed,
                    config=options.align,
                )
        for gm in (student.capture.gm, student.gm):
            move_to(gm, device)
        for p in student.gm.parameters():
            p.requires_grad_(False)
    mode = options.inductor_mode if options.compiler == "inductor" else None
    forward = torch.compile(student.gm.forward, backend=options.compiler, dynamic=True, fullgraph=True, mode=mode)
    return Prepared(student.capture, forward, versions, options)


class StudentCall:
    """Runs in place of one of Dynamo's graphs. One student serves all graphs of a module."""

    def __init__(self, call: Call, graph: GraphModule, options: BackendOptions) -> None:
        self.call, self.options, self.key = call, options, options.key()
        self.unchecked: GraphModule | None = graph

    def __call__(self, *args: Any) -> tuple[Tensor]:
        module = self.call.module()
        assert module is not None, "a call of a module that is gone"
        from torch._dynamo.convert_frame import compile_lock

        ids, positions, mask = self.call.arguments(args)
        with torch.no_grad():
            with compile_lock:  # neither torch.export nor Dynamo is for two threads at a time
                prepared = self._prepared(module, [args[i] for i in self.call.weights])
                inputs = prepared.arguments(ids, positions)
                if self.unchecked is not None:
                    _check_logits(self.unchecked(*args)[0], prepared.capture.gm(*inputs), mask)
                    self.unchecked = None
            return (prepared.forward(*inputs),)

    def _prepared(self, module: nn.Module, weights: Sequence[Tensor]) -> Prepared:
        known = _PREPARED.setdefault(module, {})
        found = known.get(self.key)
        fits = found is not None and found.fits(weights)
        if module.training or not fits:
            _check_eval(module)
        if found is not None and fits:
            return found
        if found is not None and self.options.policy is not None and found.holds(weights):
            hint = "torch._dynamo.reset(), and the next call converts it anew"
            raise UnsupportedModelError(MODEL, "its weights were changed after it was converted", hint)
        made = known[self.key] = prepare(module, self.options)
        if not made.holds(weights):  # Dynamo's guards see no difference between two models of one class
            what = "is another one of the same class than that for which Dynamo traced this graph with these options"
            raise UnsupportedModelError(MODEL, what, "torch._dynamo.reset() before another model is called")
        return made


def _check_eval(module: nn.Module) -> None:
    if training := [n or type(module).__name__ for n, m in module.named_modules() if m.training]:
        what = f"is in training mode ({len(training)} modules, such as {training[0]}); this backend is for inference"
        raise UnsupportedModelError(MODEL, what, "model.eval()")


def _check_logits(returned: Tensor, logits: Tensor, mask: Tensor | None) -> None:
    """The compiled function returns the captured model's logits, and nothing made of them."""
    if returned.shape != logits.shape:
        what = f"returns {list(returned.shape)}, the model's logits are {list(logits.shape)}"
        raise UnsupportedModelError(WHERE, what, "a call that returns all logits; compile the model, not its user")
    seen = slice(None) if mask is None else mask
    error, largest = (returned - logits)[seen].abs().max().item(), logits[seen].abs().max().item()
    if not error <= ANOTHER_FUNCTION * largest:
        what = (
            f"returns something else than the model's logits: they differ by {error:.3g}, the largest is {largest:.3g}"
        )
        raise UnsupportedModelError(WHERE, what, "a call that returns the logits; compile the model, not its user")


def _raises(error: TcalError) -> Callable[..., Any]:
    def refuse(*_: Any) -> Any:
        raise type(error)(error.where, error.what, error.hint)

    return refuse


def tcal(
    graph: GraphModule, example_inputs: Sequence[Any], *, options: dict[str, Any] | None = None, mode: str | None = None
) -> Callable[..., Any]:
    """What torch.compile calls with each of Dynamo's graphs; options as in BackendOptions."""
    try:
        wanted = read_options(options, mode)
        return StudentCall(read_call(graph, example_inputs), graph, wanted)
    except TcalError as error:
        return _raises(error)


def _reset() -> None:
    """torch._dynamo.reset() calls this: students are made anew, from the run folders as they then are."""
    _PREPARED.clear()


tcal.reset = _reset  # type: ignore[attr-defined]


def register_backend() -> None:
    """Makes backend="tcal" known to torch.compile where the package is not installed, such as in a bare checkout."""
    from torch._dynamo import list_backends
    from torch._dynamo import register_backend as register

    if NAME not in list_backends(exclude_tags=()):
        register(tcal, name=NAME)
