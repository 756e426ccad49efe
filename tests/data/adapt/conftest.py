import pytest

from tests.data.adapt.files import SIZE, picture


@pytest.fixture
def images(tmp_path):
    """Makes files of the given names in a folder of images, and gives the folder."""

    def make(*names, size=SIZE):
        for i, name in enumerate(names):
            path = tmp_path / "images" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(picture(i, size, "PNG" if name.endswith(".png") else "JPEG"))
        return tmp_path / "images"

    return make
