from pathlib import Path

import pytest

from simla_ray.data.adapt.reading import need
from simla_ray.errors import UserError


def test_a_field_with_a_line_break_in_its_name_makes_no_second_line():
    with pytest.raises(UserError) as said:
        need(Path("a.json"), {"\n": None, "text": 1}, ["question"])
    assert str(said.value) == "a.json: no field question; found '\\n', text"
