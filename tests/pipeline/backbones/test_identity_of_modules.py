"""A module's identity by what it holds: attributes, parts, hooks; what has no name is refused."""

import copy
import enum
import functools
import io
import json
import random
import sys
import textwrap
import threading
from collections import OrderedDict, namedtuple
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, Literal, TypeVar

import numpy as np
import pytest
import torch
from torch import nn

from varve.pipeline.backbones import load
from varve.pipeline.backbones._fingerprint import identity
from varve.stores.digests import canonical, digest


def run(text, name="a_notebook", **variables):
    space = {"__name__": name, "torch": torch, "nn": nn, **variables}
    exec(compile(textwrap.dedent(text), f"<{name}>", "exec"), space)
    return SimpleNamespace(**space)


class Holder(nn.Module):
    """Holds what it is given as attributes."""

    def __init__(self, **attributes):
        super().__init__()
        for name, value in attributes.items():
            setattr(self, name, value)


class Vouched(Holder):
    code = "vouched/1"


def key(module, known=()):
    described = identity(module, known)
    assert json.loads(canonical(described)) == described
    return digest(described)


def doubled(x):
    return x * 2


def halved(x):
    return x / 2


def test_a_library_class_counts_by_its_name():
    described = identity(Holder(act=nn.GELU("tanh"), up=nn.functional.interpolate, kind=nn.ReLU))
    assert described["children"][0][1]["code"] == {"name": "torch.nn.modules.activation.GELU"}
    assert described["attributes"] == {
        "kind": {"name": "torch.nn.modules.activation.ReLU"},
        "up": {"name": "torch.nn.functional.interpolate"},
    }


def test_options_and_the_order_of_torchs_layers_count():
    modules = [
        *(nn.LayerNorm(4, eps=1e-5), nn.LayerNorm(4, eps=1e-6), nn.LayerNorm((4,), eps=1)),
        *(nn.Conv2d(4, 4, 3), nn.Conv2d(4, 4, 3, stride=2), nn.Conv2d(4, 4, 3, padding=1)),
        *(nn.Conv2d(4, 4, 3, padding_mode="reflect"), nn.Conv2d(4, 4, 3, dilation=2)),
        *(nn.GELU(), nn.GELU("tanh"), nn.LeakyReLU(0.1), nn.LeakyReLU(0.2), nn.Dropout(0.1)),
        *(nn.MultiheadAttention(4, 2), nn.MultiheadAttention(4, 4), nn.Upsample(scale_factor=2)),
        *(nn.Sequential(nn.ReLU(), nn.GELU()), nn.Sequential(nn.GELU(), nn.ReLU())),
        *(Holder(a=nn.ReLU(), b=nn.ReLU()), Holder(b=nn.ReLU(), a=nn.ReLU())),
    ]
    keys = [key(nn.Sequential(module)) for module in modules]
    assert len(set(keys)) == len(keys)


ATTRIBUTES = [
    *(None, True, 1, 1.0, "a", 2.5, float("inf"), float("nan"), -0.0, 0.0, b"a", 1j, ...),
    *([1, 2], (1, 2), {1, 2}, {"a": 1}, {"a": (1,)}, {1: "a"}, {"a": 1, "b": 2}, {"b": 2, "a": 1}),
    *([], (), {}, set(), [[]], OrderedDict(a=1, b=2), {"tuple": [1, 2]}, "{'a': 1}"),
    *(torch.float32, torch.float16, torch.Size([3]), torch.channels_last, np.dtype("f4")),
    *(np.float32(1), np.float64(1), np.arange(3), np.arange(3.0), np.arange(3)[::-1]),
    *(torch.zeros(2), torch.zeros(2, 1), torch.zeros(2, dtype=torch.int32), np.zeros((2, 1), "f4")),
    *(torch.arange(3), torch.arange(3.0), torch.arange(4).reshape(2, 2), torch.tensor(1)),
    *(Path("a"), Path("b"), slice(1), slice(2), range(3), enum.Enum("E", "A B").A),
    *(enum.Enum("E", "A B").B, functools.partial(doubled), functools.partial(doubled, x=1)),
    *(nn.GELU, nn.ReLU, torch.relu, torch.sigmoid, nn.functional.gelu, nn.functional.max_pool2d),
    *(nn.functional.interpolate, np.mean, np.sin, torch.Tensor.relu, "x".join, "y".join, len),
    *(doubled, halved, nn.Linear.forward, torch.compile(doubled), functools.cache(doubled)),
    *(int | str, int | None, list[int], list[str], Literal["a"], Literal["b"], Any, TypeVar("T")),
    *(SimpleNamespace(a=1), SimpleNamespace(a=2), namedtuple("Pair", "a b")(1, 2), textwrap.dedent),
    *(namedtuple("Pair", "b a")(1, 2), object(), [nn.GELU()], [nn.GELU("tanh")], [doubled]),
]


def test_no_two_values_of_an_attribute_look_alike():
    keys = [key(Holder(value=value)) for value in ATTRIBUTES]
    again = [key(Holder(value=copy.copy(value))) for value in ATTRIBUTES]
    assert keys == again
    assert len(set(keys)) == len(keys)


def test_sets_and_attributes_have_no_order():
    first, second = {0, 8}, {8, 0}
    assert list(first) != list(second)
    assert key(Holder(a=first, b=1)) == key(Holder(b=1, a=second))
    assert key(Holder(a=SimpleNamespace(b=1, c=2))) == key(Holder(a=SimpleNamespace(c=2, b=1)))


def partial(text):
    notebook = run(f"""
        import functools

        class Partial(functools.partial):
            def __call__(self, x):
                return {text}
    """)
    return notebook.Partial(doubled)


class Row(list):
    """A list of its own kind."""


class Name(str):
    """A string of its own kind."""


def test_what_extends_a_plain_type_counts_with_what_it_contains():
    values = [Row([1]), Row([2]), [1], Name("a"), Name("b"), "a", Row([Name("a")])]
    values += [partial("x"), partial("-x"), functools.partial(doubled)]
    assert len({key(Holder(value=value)) for value in values}) == len(values)


def test_a_container_may_contain_itself():
    def key_of(value):
        values = [value]
        values.append({"again": values})
        return key(Holder(values=values))

    assert key_of(1) == key_of(1) != key_of(2)


class Marked(torch.Tensor):
    """A tensor with a mind of its own."""


UNNAMED = {
    "an open file": (io.StringIO, "_io.StringIO"),
    "numpy's generator": (np.random.default_rng, "numpy.random._generator.Generator"),
    "torch's generator": (torch.Generator, "torch._C.Generator"),
    "python's generator": (random.Random, "random.Random"),
    "an iterator": (lambda: iter([1]), "builtins.list_iterator"),
    "a lock": (threading.Lock, "_thread.lock"),
    "objects in an array": (lambda: np.array([object()]), "ndarray of object"),
    "another kind of array": (lambda: np.ma.array([1]), "MaskedArray"),
    "another kind of tensor": (lambda: torch.ones(2).as_subclass(Marked), "Marked"),
    "no data": (lambda: torch.ones(2, device="meta"), "meta"),
}


@pytest.mark.parametrize(("make", "message"), UNNAMED.values(), ids=list(UNNAMED))
def test_a_value_without_a_fingerprint_is_refused_with_its_path(make, message):
    inside = nn.Sequential(nn.ReLU(), Holder(setting=[{"deep": make()}]))
    with pytest.raises(TypeError, match=r"Sequential\.1\.setting\[0\]\[deep\] is .*which no key"):
        identity(inside)
    with pytest.raises(TypeError, match=message):
        identity(Holder(setting=SimpleNamespace(kept=make())))


def test_an_underscore_lets_a_class_with_code_keep_what_has_no_name():
    assert key(Vouched(_rng=np.random.default_rng(0)))
    assert key(Vouched(_rng=SimpleNamespace(kept=[np.random.default_rng(0)])))
    with pytest.raises(TypeError, match=r"Vouched\.rng"):
        identity(Vouched(rng=np.random.default_rng(0)))
    with pytest.raises(TypeError, match=r"Holder\._rng"):
        identity(Holder(_rng=np.random.default_rng(0)))
    assert key(Vouched(_width=1)) != key(Vouched(_width=2))


def test_parameters_and_buffers_do_not_count_nor_do_devices_and_modes():
    network = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2), nn.LSTM(2, 2), Holder(at="x"))
    network.append(Holder(device=torch.device("cpu"), same=network[0].weight))
    before = key(network)
    with torch.no_grad():
        network[0].weight.add_(1)
        network[1].running_mean.add_(1)
        network[2].weight_ih_l0.add_(1)
    assert key(network) == before
    network[-1].device = torch.device("meta")
    assert key(network.eval()) == before
    assert key(copy.deepcopy(network)) == before
    if torch.cuda.is_available():
        assert key(network.cuda()) == before


def test_tensors_and_modules_outside_the_state_count_by_their_bytes():
    keys = set()
    for value in (1.0, 2.0):
        linear = nn.Linear(1, 1, bias=False)
        nn.init.constant_(linear.weight, value)
        keys |= {key(Holder(hidden=[linear])), key(Holder(hidden=[linear.weight]))}
    assert len(keys) == 4


def test_a_module_may_refer_to_its_parent():
    child = Holder(scale=1)
    parent = Holder(child=child)
    child.parent = [parent]
    before = key(parent)
    parent.other = 2
    assert key(parent) != before


def test_hooks_are_refused():
    for register in ("register_forward_hook", "register_forward_pre_hook"):
        network = nn.Sequential(nn.ReLU(), nn.Linear(2, 2))
        handle = getattr(network[1], register)(lambda *arguments: None)
        with pytest.raises(ValueError, match=r"Sequential\.1 \(Linear\) has forward hooks"):
            identity(network)
        handle.remove()
        assert key(network)


def test_compiled_modules_are_refused_without_side_effects():
    plain = nn.Linear(2, 2)
    before = key(plain)
    with pytest.raises(ValueError, match=r"Sequential\.0 .*is compiled"):
        identity(nn.Sequential(torch.compile(plain)))
    assert key(plain) == before
    plain.compile()
    with pytest.raises(ValueError, match="is compiled"):
        identity(plain)


def test_a_parametrization_counts():
    def key_with(function):
        linear = nn.Linear(3, 3)
        part = run(f"class Part(nn.Module):\n    def forward(self, x): return {function}").Part()
        return key(nn.utils.parametrize.register_parametrization(linear, "weight", part))

    assert key_with("x.triu()") == key_with("x.triu()")
    assert len({key_with("x.triu()"), key_with("x.tril()"), key(nn.Linear(3, 3))}) == 3


def test_known_modules_count_by_their_description():
    stage = Holder(rng=np.random.default_rng(0))
    stage.register_forward_hook(lambda *arguments: None)
    holder = Holder(inner=stage, also=[stage], scale=1)
    keys = {key(holder, [(stage, {"code": code, "options": {"a": (1, 2)}})]) for code in "ab"}
    assert len(keys) == 2
    assert identity(holder, [(stage, {"code": "a"})])["children"] == [["inner", {"code": "a"}]]
    assert key(stage, [(stage, {"code": "a"})]) == digest({"code": "a"})
    with pytest.raises(ValueError, match="hooks"):
        identity(holder, [(copy.deepcopy(stage), {"code": "a"})])


def test_circles_of_two_and_of_three_that_are_alike_nearby_are_distinguished():
    def ring(*values):
        nodes = [SimpleNamespace(value=value) for value in values]
        for node, following in zip(nodes, nodes[1:] + nodes[:1], strict=True):
            node.next = following
        return key(Holder(ring=nodes[0]))

    assert ring(1) == ring(1, 1) == ring(1, 1, 1)
    assert len({ring(1, 1, 2), ring(1, 1, 1, 2), ring(1, 1, 1, 1, 2)}) == 3
    assert len({ring(1), ring(1, 2), ring(1, 1, 2), ring(1, 2, 2), ring(2, 1), ring(2)}) == 6
    lasso = SimpleNamespace(value=1)
    lasso.next = SimpleNamespace(value=2)
    lasso.next.next = lasso.next
    assert key(Holder(ring=lasso)) not in {ring(1, 2), ring(1), ring(2)}


@dataclass(frozen=True, slots=True)
class Options:
    depth: int = 2
    names: tuple[str, ...] = ()


class Kind(enum.Enum):
    SUM = "sum"
    MEAN = "mean"

    def join(self, x):
        return getattr(x, self.value)(0)


class Doubling(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x * 2

    @staticmethod
    def backward(ctx, grad):
        return grad * 2


def test_plain_objects_enums_and_functions_with_gradients_have_names():
    values = [
        *(Options(), Options(3), Options(names=("a",)), Options, Kind.SUM, Kind.MEAN, Kind),
        *(Doubling, Doubling.apply, Kind.SUM.join, Kind.MEAN.join),
    ]
    keys = [key(Holder(value=value)) for value in values]
    assert keys == [key(Holder(value=copy.deepcopy(value))) for value in values]
    assert len(set(keys)) == len(keys)


def torchvision_blocks():
    from torchvision.models.resnet import BasicBlock, Bottleneck

    yield BasicBlock(8, 8)
    yield BasicBlock(8, 8, stride=2, downsample=nn.Conv2d(8, 8, 1, 2))
    yield BasicBlock(8, 8, norm_layer=functools.partial(nn.BatchNorm2d, eps=1e-3))
    yield Bottleneck(8, 2)
    yield Bottleneck(8, 2, dilation=2)


def timm_blocks():
    from timm.models.vision_transformer import Block

    yield Block(8, 2)
    yield Block(8, 4)
    yield Block(8, 2, init_values=1e-5)
    yield Block(8, 2, norm_layer=functools.partial(nn.LayerNorm, eps=1e-3))


def clip_blocks():
    from open_clip.transformer import QuickGELU, ResidualAttentionBlock

    yield ResidualAttentionBlock(8, 2)
    yield ResidualAttentionBlock(8, 4)
    yield ResidualAttentionBlock(8, 2, act_layer=QuickGELU)
    yield ResidualAttentionBlock(8, 2, ls_init_value=1e-5)


@pytest.mark.parametrize("blocks", [torchvision_blocks, timm_blocks, clip_blocks])
def test_blocks_of_published_networks_differ_by_their_options(blocks):
    keys = [key(block) for block in blocks()]
    assert keys == [key(block) for block in blocks()]
    assert len(set(keys)) == len(keys)
    subclass = type("Mine", (type(next(blocks())),), {"forward": doubled})
    block = next(blocks())
    block.__class__ = subclass
    assert key(block) not in keys


@pytest.mark.parametrize("name", ["ViT-B-32", "resnet18", "vit_small_patch14_dinov2"])
def test_stages_of_a_network_have_an_identity_that_running_them_does_not_change(name):
    backbone = load(f"{name}:random-0")
    stages = [stage.module for stage in backbone.stages[:3]]
    before = [key(stage) for stage in stages]
    size = backbone.picture.size
    x = torch.zeros(1, size, size, 3, dtype=torch.uint8)
    with torch.no_grad():
        for stage in stages:
            x = stage(x)
    assert [key(stage) for stage in stages] == before


def test_none_of_the_modules_code_is_run(monkeypatch):
    class Alarmed(Holder):
        @property
        def trap(self):
            raise AssertionError("a property was evaluated")

        def __getattr__(self, name):
            if name in ("__qualname__", "code", "trap"):
                raise AssertionError(f"{name} was asked for")
            return super().__getattr__(name)

        def __repr__(self):
            raise AssertionError("it was printed")

    class Loud:
        def __repr__(self):
            raise AssertionError("it was printed")

        def __eq__(self, other):
            raise AssertionError("it was compared")

        __str__ = __bool__ = __len__ = __hash__ = __repr__

        def __getattr__(self, name):
            raise AssertionError(f"{name} was asked for")

    def alarm(name):
        raise AssertionError(f"{name} was asked for")

    monkeypatch.setitem(sys.modules, "my_own", ModuleType("my_own"))
    sys.modules["my_own"].__getattr__ = alarm
    gone = run("class Gone: pass", "my_own").Gone
    alarmed = Alarmed(loud=Loud(), keyed={1: Loud()}, gone=[gone, gone()])
    state = torch.get_rng_state()
    assert key(alarmed)
    assert torch.equal(torch.get_rng_state(), state)
