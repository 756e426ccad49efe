import pytest

from simla_ray.data.adapt.command import FORMATS, main


def test_help_names_every_format(capsys):
    with pytest.raises(SystemExit):
        main(["--help"])
    text = capsys.readouterr().out
    assert all(f"\n{format} " in text for format in FORMATS)
