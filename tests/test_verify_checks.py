"""Checks that `tcal verify` makes of a teacher itself."""

from __future__ import annotations

import pytest
from tiny_models import scanned

from tcal_compiler.api import Source
from tcal_compiler.runs import _statistics_checks, _unconverted_checks


@pytest.mark.parametrize("core", ["is_causal", "written out", "window"])
def test_statistics_of_parts_whatever_the_first_core_is_written_as(core):
    capture, scan = scanned(core)
    source = Source(teacher=None, tokenizer=None, capture=capture, scan=scan)
    for check in (*_statistics_checks(source), *_unconverted_checks(source)):
        assert check.passed, check
