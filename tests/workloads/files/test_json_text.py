"""JSON that other programs than Python read."""

import json
import math

from workloads.files.json_text import json_text


def test_numbers_that_are_not_finite_become_null():
    text = json_text({"a": [1.5, math.nan, (math.inf,)], "b": {"c": -math.inf}, "d": "NaN"})
    assert json.loads(text) == {"a": [1.5, None, [None]], "b": {"c": None}, "d": "NaN"}
    assert json_text({"a": 1e300}) == json.dumps({"a": 1e300})
