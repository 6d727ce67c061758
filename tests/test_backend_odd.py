"""The torch.compile backend, called in unusual ways."""

from __future__ import annotations

import copy
from concurrent.futures import ThreadPoolExecutor

import torch
from test_backend import _fresh_dynamo, assert_close, compiled, converting, ids_of, refused, tiny

from tcal_compiler.errors import UnsupportedModelError

fixtures = _fresh_dynamo, tiny


def test_no_tokens(tiny, shared_run):
    with refused(UnsupportedModelError, r"passes \[2, 0\] token ids"):
        compiled(tiny, shared_run)(ids_of(2, 0))


def test_a_model_without_a_site_is_refused_for_that_and_not_for_its_policy(tiny, monkeypatch):
    real = torch.nn.functional.scaled_dot_product_attention
    whole = lambda *args, **options: real(*args, **(options | {"is_causal": False}))  # noqa: E731
    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", whole)
    with refused(UnsupportedModelError, "no attention core that can be converted", "not causal: the mask is absent"):
        converting(tiny, [ids_of(4, 9)])(ids_of(2, 9))


def test_a_module_that_is_compiled_in_place(tiny):
    """model.compile(): the capture is of what the module computes, not of what stands in its place."""
    model = copy.deepcopy(tiny)
    options = {"policy": "all", "calibrate": [ids_of(3, 24)], "compiler": "eager", "align": {"steps": 0}}
    model.compile(backend="tcal", fullgraph=True, dynamic=True, options=options)
    assert_close(model(ids_of(2, 9)), tiny(ids_of(2, 9)))


def test_threads_make_one_student(tiny):
    fast, wanted = converting(tiny, [ids_of(3, 24)], policy="all"), tiny(ids_of(2, 9))
    with torch.no_grad(), ThreadPoolExecutor(3) as pool:
        for logits in pool.map(lambda _: fast(ids_of(2, 9)).detach(), range(3)):
            assert_close(logits, wanted)
