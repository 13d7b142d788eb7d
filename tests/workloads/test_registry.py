"""The registry: one name, one record; and what of each registry is also written elsewhere."""

from dataclasses import dataclass, replace
from typing import get_args

import pytest
import tyro

from workloads.attention.patterns import PATTERNS, Attention
from workloads.attention.patterns.shifted_sparse import S2
from workloads.errors import InputError
from workloads.evaluation.retrieval import RetrievalOptions
from workloads.evaluation.tasks import TASKS, options_of
from workloads.evaluation.tasks.passkey import PASSKEY
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


@dataclass(frozen=True, kw_only=True)
class CodewordOptions(RetrievalOptions):
    words: int = 4


def parsed(tasks, *arguments):
    return tyro.cli(options_of(tasks), args=["builtin:tiny", *arguments])


def with_task(**changes):
    return Registry("evaluation", (*TASKS.values(), replace(PASSKEY, name="codeword", **changes)))


def test_the_evaluate_command_takes_the_options_of_each_registered_evaluation():
    options = parsed(with_task(options=CodewordOptions), "codeword", "passkey", "--words", "3", "--depths", "5")
    assert options.tasks == ("codeword", "passkey")
    assert (options.words, options.depths, options.tests, options.stride) == (3, (5.0,), 10, None)


def test_an_evaluation_needs_no_options_of_its_own():
    assert parsed(with_task(options=RetrievalOptions), "codeword", "--tests", "2").tests == 2


def test_an_option_is_defined_once():
    @dataclass(frozen=True, kw_only=True)
    class Clash(RetrievalOptions):
        stride: int = 1

    with pytest.raises(ValueError, match="option 'stride' is defined by two evaluations"):
        options_of(with_task(options=Clash))


def test_the_evaluate_command_refuses_an_unknown_evaluation(capsys):
    with pytest.raises(SystemExit):
        parsed(TASKS, "codeword")
    assert "perplexity" in (said := capsys.readouterr().err) and "passkey" in said and "topics" in said
    with pytest.raises(InputError, match="evaluation 'codeword' is unknown; expected one of perplexity, passkey"):
        TASKS["codeword"]
