"""Files of torch.save are read as torch reads them, and nothing in them is run."""

import argparse
import io
import os
import pickle
import sys
import types
import zipfile
from collections import OrderedDict

import pytest
import torch
from torch import nn

from simla_ray.errors import UserError
from simla_ray.models.pickles import Stub, opened, read_state

BASE = torch.arange(24.0).view(4, 6)
STATE = {
    **{str(dtype): torch.arange(6).to(dtype) for dtype in (
        torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int16, torch.int8,
        torch.uint8, torch.bool)},
    "scalar": torch.tensor(0.07), "empty": torch.zeros(0, 3), "parameter": nn.Parameter(torch.randn(3, 2)),
    "whole": BASE, "transposed": BASE.T, "part": BASE[1:3, ::2],
}  # fmt: skip


def save(path, value, layout):
    torch.save(value, path, _use_new_zipfile_serialization=layout == "zip")
    return path


@pytest.fixture(params=["zip", "legacy"])
def layout(request):
    return request.param


@pytest.mark.parametrize("nest", [lambda s: s, lambda s: {"model": OrderedDict(s), "epoch": 3}])
def test_tensors_come_out_as_torch_reads_them(tmp_path, layout, nest):
    path = save(tmp_path / "a.pth", nest(STATE), layout)
    tensors, foreign = read_state(path)
    assert foreign == []
    assert list(tensors) == list(STATE)
    for name, tensor in STATE.items():
        ours = tensors[name]
        assert ours.dtype == tensor.dtype and ours.shape == tensor.shape and ours.is_contiguous(), name
        assert torch.equal(ours, tensor.detach()), name
    tensors["whole"].zero_()
    assert torch.equal(tensors["part"], BASE[1:3, ::2])  # memory of its own


@pytest.fixture
def foreign_module():
    """A module whose classes are in the file and gone when it is read, as omegaconf is here."""
    module = types.ModuleType("gone_config")
    source = """
class Node:
    def __init__(self, value): self._val, self._parent = value, None
    def __getstate__(self): return dict(self.__dict__)
    def __setstate__(self, state): raise RuntimeError("was run")
class DictConfig:
    def __init__(self, content):
        self.__dict__["_content"] = {k: Node(v) for k, v in content.items()}
        for node in self._content.values(): node._parent = self
    def __getattr__(self, name): raise RuntimeError("was run")
    def __getstate__(self): return self.__dict__
    def __setstate__(self, state): raise RuntimeError("was run")
class CommentedMap(dict):
    def __setitem__(self, key, value): raise RuntimeError("was run")
class CommentedSeq(list):
    def append(self, value): raise RuntimeError("was run")
    extend = append
def build(*args): raise RuntimeError("was run")
class Made:
    def __reduce__(self): return build, (1, 2)
"""
    exec(source, module.__dict__)
    for value in list(vars(module).values()):
        if isinstance(value, type | types.FunctionType):
            value.__module__ = module.__name__
    sys.modules[module.__name__] = module
    yield module
    sys.modules.pop(module.__name__, None)


def test_foreign_objects_are_stubs(tmp_path, layout, foreign_module):
    mapping, sequence = foreign_module.CommentedMap(), foreign_module.CommentedSeq()
    dict.__setitem__(mapping, "lr", 1e-4)
    list.append(sequence, 384)
    content = {
        "model": {"w": torch.ones(2)},
        "config": foreign_module.DictConfig({"queue_size": 65536, "optimizer": {"opt": "adamW"}}),
        "args": argparse.Namespace(distributed=True, device="cuda"),
        "others": [mapping, sequence, foreign_module.Made(), {1, 2}, torch.device("cpu")],
        "optimizer": torch.optim.AdamW(nn.Linear(2, 2).parameters()).state_dict(),
    }
    path = save(tmp_path / "a.pth", content, layout)
    del sys.modules[foreign_module.__name__]
    with opened(path) as archive:
        root = archive.root
        config = root["config"]
        assert isinstance(config, Stub) and repr(config) == "<gone_config.DictConfig, not read>"
        assert config.state["_content"]["queue_size"].state["_val"] == 65536
        assert config.state["_content"]["queue_size"].state["_parent"] is config
        assert root["args"].state == {"distributed": True, "device": "cuda"}
        assert root["others"][0].items == [("lr", 1e-4)] and root["others"][1].items == [384]
        assert root["others"][2].args == (1, 2)
    tensors, foreign = read_state(path)
    assert torch.equal(tensors["w"], torch.ones(2))
    assert {"gone_config.DictConfig", "argparse.Namespace", "gone_config.build"} <= set(foreign)
    assert foreign_module.__name__ not in sys.modules


def test_only_the_weights_are_read(tmp_path):
    """The optimiser's storages may be missing altogether."""
    whole = io.BytesIO()
    torch.save({"optimizer": torch.full((1000,), 2.0), "model": {"w": torch.ones(2)}}, whole)
    with zipfile.ZipFile(whole) as old, zipfile.ZipFile(tmp_path / "a.pth", "w") as new:
        for name in old.namelist():
            if len(old.read(name)) != 4000:
                new.writestr(name, old.read(name))
    assert torch.equal(read_state(tmp_path / "a.pth")[0]["w"], torch.ones(2))


class Reduce:
    def __init__(self, function, *args):
        self.function, self.args = function, args

    def __reduce__(self):
        return self.function, self.args


def nested(marker):
    """A call of what a call gives, with the second one's result as its argument."""
    return Reduce(_call, Reduce(getattr, os.system, "__call__"), f"touch {marker}")


def _call(function, argument):
    return function(argument)


def attacks(marker):
    """name -> pickle; each touches the marker if anything in it is run."""
    touch = f"touch {marker}"
    text = f"V{touch}\n".encode()
    code = f"V__import__('os').system({touch!r})\n".encode()
    build = f"}}V__class__\nV{touch}\ns".encode()
    return {
        "reduce system": pickle.dumps(Reduce(os.system, touch), 2),
        "reduce eval": pickle.dumps(Reduce(eval, f"__import__('os').system({touch!r})"), 2),
        "reduce in protocol 4": pickle.dumps(Reduce(os.system, touch), 4),
        "reduce in protocol 0": pickle.dumps(Reduce(os.system, touch), 0),
        "builtins.exec by its old name": b"\x80\x02c__builtin__\nexec\n" + code + b"\x85R.",
        "inst": b"\x80\x02(" + text + b"ios\nsystem\n.",
        "obj": b"\x80\x02(cos\nsystem\n" + text + b"o.",
        "newobj": b"\x80\x02csubprocess\nPopen\n(" + text + b"N\x8a\x01\x00t\x81.",
        "newobj_ex": b"\x80\x04csubprocess\nPopen\n" + text + b"\x85}V shell\nI01\ns\x92.",
        "dotted name": b"\x80\x04\x8c\x02os\x8c\x06system\x93" + text + b"\x85R.",
        "attribute of an allowed class": b"\x80\x04\x8c\x0bcollections\x8c\x14OrderedDict.__init__\x93"
        + text
        + b"\x85R.",
        "dotted way to builtins": b"\x80\x04\x8c\x0bcollections\x8c\x1b_sys.modules.os.system.call\x93"
        + text
        + b"\x85R.",
        "call of a result": b"\x80\x02cbuiltins\ngetattr\ncos\nos\nVsystem\n\x86R" + text + b"\x85R.",
        "setstate": b"\x80\x02c__main__\nThing\n)\x81" + build + b"b.",
        "build on a class": b"\x80\x02ccollections\nOrderedDict\n" + build + b"b.",
        "build slots on a class": b"\x80\x02ccollections\nOrderedDict\nN" + build + b"\x86b.",
        "tampering": b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\nN}V__code__\nI1\ns\x86b.",
        "persistent id": b"\x80\x02(Vstorage\ncos\nsystem\nV0\nVcpu\nI1\ntQ.",
        "extension": b"\x80\x02\x82\x01.",
        "buffer": b"\x80\x05\x97.",
        "endless memo": b"\x80\x02Nr\xff\xff\xff\xff.",
        "unhashable key": b"\x80\x02}]Nsa.",
    }


ATTACKS = sorted(attacks("x"))


def archive_of(path, data):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", data)
        archive.writestr("archive/data/0", b"\0" * 64)


@pytest.mark.parametrize("where", ["zip", "legacy", "bare"])
@pytest.mark.parametrize("name", ATTACKS)
def test_nothing_is_run(tmp_path, name, where):
    marker, path = tmp_path / "was_run", tmp_path / "evil.pth"
    data = attacks(marker)[name]
    rebuild, before = torch._utils._rebuild_tensor_v2, torch._utils._rebuild_tensor_v2.__code__
    if where == "zip":
        archive_of(path, data)
    elif where == "legacy":
        head = [pickle.dumps(x, 2) for x in (0x1950A86A20F9469CFC6C, 1001, {"little_endian": True})]
        path.write_bytes(b"".join([*head, data, pickle.dumps([], 2)]))
    else:
        path.write_bytes(data)
    with pytest.raises(UserError, match=r"evil\.pth: no checkpoint") as error:
        read_state(path)
    assert "\n" not in str(error.value)
    assert not marker.exists()
    assert rebuild.__code__ is before and OrderedDict.__init__ is not None


@pytest.mark.parametrize("evil", [lambda m: Reduce(os.system, f"touch {m}"), nested])
def test_weights_beside_an_attack_are_read_and_nothing_is_run(tmp_path, layout, evil):
    path = save(tmp_path / "a.pth", {"model": {"w": torch.ones(2)}, "config": evil(tmp_path / "was_run")}, layout)
    tensors, foreign = read_state(path)
    assert torch.equal(tensors["w"], torch.ones(2))
    assert any(name.endswith((".system", "_call")) for name in foreign)
    assert not (tmp_path / "was_run").exists()


def test_an_attack_in_place_of_a_tensor_is_named(tmp_path):
    path = save(tmp_path / "a.pth", {"w": torch.ones(2), "x": Reduce(os.system, f"touch {tmp_path}/was_run")}, "zip")
    with pytest.raises(UserError, match=r"a\.pth: no checkpoint .*1 are no tensors: x"):
        read_state(path)
    assert not (tmp_path / "was_run").exists()


@pytest.mark.parametrize(
    ("size", "stride", "offset"),
    [
        ((100,), (1,), 0),
        ((4,), (1,), 14),
        ((2,), (1,), -1),
        ((2, 2), (1000, 1), 0),
        ((1 << 40,), (0,), 0),
        ((-1,), (1,), 0),
        ((2.5,), (1,), 0),
        ((2,), ("1",), 0),
    ],
)
def test_a_tensor_outside_of_its_storage_is_refused(tmp_path, size, stride, offset):
    class Storage:
        pass

    class Pickler(pickle.Pickler):
        def persistent_id(self, value):
            return ("storage", torch.FloatStorage, "0", "cpu", 16) if isinstance(value, Storage) else None

    data = io.BytesIO()
    rebuilt = Reduce(torch._utils._rebuild_tensor_v2, Storage(), offset, size, stride, False, OrderedDict())
    Pickler(data, 2).dump({"w": rebuilt})
    archive_of(tmp_path / "a.pth", data.getvalue())
    with pytest.raises(UserError, match="no checkpoint"):
        read_state(tmp_path / "a.pth")


def write(path, data):
    path.write_bytes(data)


def zipped(path, names, compression=zipfile.ZIP_STORED):
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name in names:
            archive.writestr(name, pickle.dumps({}, 2))


NO_CHECKPOINT = {
    "missing": (lambda p: None, "No such file"),
    "folder": (lambda p: p.mkdir(), "Is a directory"),
    "empty": (lambda p: write(p, b""), ""),
    "text": (lambda p: write(p, b"not weights at all\n"), ""),
    "picture": (lambda p: write(p, b"\x89PNG\r\n\x1a\n" + bytes(range(256))), ""),
    "plain pickle": (lambda p: write(p, pickle.dumps({"a": 1})), "not a file of torch.save"),
    "other zip": (lambda p: zipped(p, ["word/document.xml"]), "not of torch.save"),
    "compressed": (lambda p: zipped(p, ["archive/data.pkl"], zipfile.ZIP_DEFLATED), ""),
    "torchscript": (lambda p: zipped(p, ["a/data.pkl", "a/constants.pkl"]), "TorchScript"),
    "no tensors": (lambda p: save(p, {"epoch": 3}, "zip"), "holds no dict of tensors"),
    "a tensor alone": (lambda p: save(p, torch.ones(2), "zip"), "holds no dict of tensors"),
    "a list": (lambda p: save(p, [torch.ones(2)], "legacy"), "holds no dict of tensors"),
}


@pytest.mark.parametrize("name", NO_CHECKPOINT)
def test_what_is_no_checkpoint_is_one_line_that_names_the_file(tmp_path, name):
    make, message = NO_CHECKPOINT[name]
    make(tmp_path / "a.pth")
    with pytest.raises(UserError, match=r"a\.pth: no checkpoint that can be read") as error:
        read_state(tmp_path / "a.pth")
    assert message in str(error.value) and "\n" not in str(error.value)


def test_a_file_cut_short_is_refused(tmp_path, layout):
    path = save(tmp_path / "a.pth", {"w": torch.ones(1000)}, layout)
    data = path.read_bytes()
    for length in (len(data) - 100, len(data) // 2, 40):
        path.write_bytes(data[:length])
        with pytest.raises(UserError, match="no checkpoint"):
            read_state(path)
