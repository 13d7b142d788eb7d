"""The registry: one name, one record; and what of each registry is also written elsewhere."""

from typing import get_args

import pytest

from workloads.attention.patterns import PATTERNS, Attention
from workloads.attention.patterns.grouped import S2
from workloads.errors import InputError
from workloads.models.positions import POSITIONS, Positions
from workloads.registry import Registry


def test_a_name_is_taken_once():
    with pytest.raises(ValueError, match="attention pattern 's2' is registered twice"):
        Registry("attention pattern", [S2, S2])


def test_an_unknown_name_is_an_error_that_lists_the_known_ones():
    for look_up in (PATTERNS.__getitem__, PATTERNS.get):
        with pytest.raises(InputError, match="attention pattern 's3' is unknown; expected one of s2, full, s2-layers"):
            look_up("s3")
    assert "s3" not in PATTERNS and "s2" in PATTERNS


def test_the_command_lines_choices_are_the_registered_names():
    assert get_args(Attention) == tuple(PATTERNS)
    assert get_args(Positions) == tuple(POSITIONS)
