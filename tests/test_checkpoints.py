"""Checkpoints of others: ADM's network, pickles of NVlabs/edm read as data alone, FastGen's .pth.

There is no genuine file here and no text of NVlabs: the pickles are made of the networks of this
project, with the structure of a genuine one, through a throw-away `torch_utils.persistence`.
"""

import collections
import io
import math
import operator
import os
import pickle
import random
import struct
import subprocess
import sys
import types

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import TINY, make_denoiser, randomise
from torch import nn
from torch.testing import assert_close

import edm_teacher as edm

SONG = TINY | {"patch_size": 1, "augment_dim": 3, "attn_resolutions": [4], "model_channels": 8}
ADM = {
    "img_resolution": 8,
    "img_channels": 3,
    "label_dim": 4,
    "augment_dim": 3,
    "model_channels": 64,
    "channel_mult": [1, 2],
    "num_blocks": 1,
    "attn_resolutions": [4],
    "dropout": 0.1,
}


def song(**changes):
    torch.manual_seed(0)
    return randomise(edm.EDMPrecond(edm.SongUNet(**(SONG | changes)))).eval()


def small_song():
    return song(channel_mult=[1], num_blocks=0, label_dim=0, augment_dim=0)


def adm(**changes):
    torch.manual_seed(0)
    return randomise(edm.EDMPrecond(edm.DhariwalUNet(**(ADM | changes)))).eval()


def assert_same(a, b):
    """The same keys in the same order, the same bits, the same answer."""
    one, other = a.state_dict(), b.state_dict()
    assert list(one) == list(other)
    assert all(torch.equal(v, other[k]) for k, v in one.items())
    x = torch.randn(2, a.img_channels, 8, 8, generator=torch.Generator().manual_seed(0))
    sigma, labels = torch.tensor([0.1, 9.0]), torch.tensor([1, -1]) if a.label_dim else None
    assert torch.equal(a(x, sigma, labels), b(x, sigma, labels))


# ---------------------------------------------------------------- the ADM network


def test_imagenet64_configuration_has_the_published_size():
    with torch.device("meta"):
        net = edm.DhariwalUNet(64, 3, 1000)
    assert sum(p.numel() for p in net.parameters()) == 295_899_267
    state = net.state_dict()
    assert len(state) == 553
    for name, shape in {
        "map_label.weight": (768, 1000),
        "map_layer0.bias": (768,),
        "enc.64x64_conv.weight": (192, 3, 3, 3),
        "enc.32x32_down.skip.resample_filter": (1, 1, 2, 2),
        "enc.32x32_block0.skip.weight": (384, 192, 1, 1),
        "enc.32x32_block1.affine.weight": (768, 768),
        "dec.8x8_in0.qkv.weight": (2304, 768, 1, 1),
        "dec.32x32_block2.proj.bias": (384,),
        "out_norm.weight": (192,),
        "out_conv.weight": (3, 192, 3, 3),
    }.items():
        assert tuple(state[name].shape) == shape
    for name in ("map_label.bias", "enc.64x64_block0.qkv.weight", "enc.32x32_down.skip.weight"):
        assert name not in state
    with torch.device("meta"):  # the first convolution has the width of its level, unlike DDPM++'s
        state = edm.DhariwalUNet(8, 3, model_channels=32, channel_mult=[2, 4]).state_dict()
    assert len(state["enc.8x8_conv.weight"]) == 64


def norm(v, layer, eps):
    """Group normalisation by its definition: 32 groups or fewer, of 4 channels or more."""
    g = v.reshape(len(v), min(32, v.shape[1] // 4), -1)
    g = (g - g.mean(2, keepdim=True)) / (g.var(2, keepdim=True, correction=0) + eps).sqrt()
    return g.reshape(v.shape) * layer.weight[:, None, None] + layer.bias[:, None, None]


def conv(x, layer):
    return F.conv2d(x, layer.weight, layer.bias, padding=layer.weight.shape[-1] // 2)


@pytest.mark.parametrize(("cin", "cout"), [(8, 8), (8, 16)])
def test_adm_block_scales_and_shifts_and_adds_without_a_factor(cin, cout):
    """skip x + conv1 silu(norm1(conv0 silu norm0 x) (scale + 1) + shift), eps = 1e-5."""
    torch.manual_seed(0)
    block = randomise(edm.UNetBlock(cin, cout, 16, 0.0, adm=True)).double()
    x, emb = torch.randn(2, cin, 4, 4).double() * 1e-2, torch.randn(2, 16).double()  # eps matters
    h = conv(F.silu(norm(x, block.norm0, 1e-5)), block.conv0)
    scale, shift = (emb @ block.affine.weight.T + block.affine.bias)[:, :, None, None].chunk(2, 1)
    h = conv(F.silu(norm(h, block.norm1, 1e-5) * (scale + 1) + shift), block.conv1)
    skip = x if cin == cout else conv(x, block.skip)
    assert_close(block(x, emb), skip + h)


@pytest.mark.parametrize(("resample", "cout"), [("up", 8), ("down", 8), ("down", 16)])
def test_adm_resamples_the_skip_and_projects_it_only_to_other_widths(resample, cout):
    block = randomise(edm.UNetBlock(8, cout, 16, 0.0, adm=True, **{resample: True}))
    x, emb = torch.randn(2, 8, 4, 4), torch.randn(2, 16)
    with torch.no_grad():
        block.conv1.weight.zero_(), block.conv1.bias.zero_()
    change = {"up": lambda v: v.repeat_interleave(2, 2).repeat_interleave(2, 3)}
    change["down"] = lambda v: v.unflatten(3, (-1, 2)).unflatten(2, (-1, 2)).mean((3, 5))
    expected = change[resample](x)
    assert (block.skip.weight is None) == (cout == 8)
    assert_close(block(x, emb), expected if cout == 8 else conv(expected, block.skip))


def test_adm_attention_has_a_head_per_64_channels_each_interleaved():
    """Channel c of head h: q, k, v at 3 (64 h + c) + {0, 1, 2}; softmax(q k / 8); no factor."""
    torch.manual_seed(0)
    block = randomise(edm.UNetBlock(128, 128, 16, 0.0, attention=True, adm=True)).double()
    assert block.heads == 2
    x, emb = torch.randn(2, 128, 3, 3).double(), torch.randn(2, 16).double()
    block.attention = False
    h = block(x, emb)
    block.attention = True
    qkv = conv(norm(h, block.norm2, 1e-5), block.qkv).flatten(2)
    a = torch.zeros(2, 128, 9).double()
    for head in range(2):
        at = 3 * (64 * head + torch.arange(64))
        q, k, v = qkv[:, at], qkv[:, at + 1], qkv[:, at + 2]
        weights = torch.einsum("bcq,bck->bqk", q, k).div(8).softmax(2)
        a[:, 64 * head : 64 * head + 64] = torch.einsum("bqk,bck->bcq", weights, v)
    assert_close(block(x, emb), h + conv(a.reshape(h.shape), block.proj))


def test_adm_attends_in_every_block_of_its_resolutions():
    """DDPM++'s decoder does so in the last block only; below 64 channels there are no heads."""
    with torch.device("meta"):
        net = edm.DhariwalUNet(**ADM)
        narrow = edm.DhariwalUNet(**(ADM | {"model_channels": 16}))
    blocks = {k for k, m in net.named_modules() if getattr(m, "attention", False)}
    expected = {"enc.4x4_block0", "dec.4x4_in0", "dec.4x4_block0", "dec.4x4_block1"}
    assert blocks == expected
    assert not any("qkv" in name for name in narrow.state_dict())


def test_adm_embedding_is_cosines_then_sines_and_labels_come_last():
    """silu(W1 silu(W0 ([cos c f, sin c f] + W' augment)) + W_y one-hot), f_i = 10000^(-i/half)."""
    net = adm().model
    label, augment, c = torch.tensor([[0.0, 0, 1, 0]]), torch.randn(1, 3), torch.tensor([0.7])
    f = 10000.0 ** (-torch.arange(32) / 32)
    emb = torch.cat([(c * f).cos(), (c * f).sin()]) + net.map_augment.weight @ augment[0]
    emb = net.map_layer1(F.silu(net.map_layer0(emb))) + net.map_label.weight[:, 2]
    assert_close(net.embed(c, label, augment)[0], F.silu(emb))
    assert torch.equal(net.embed(c, None, augment), net.embed(c, 0 * label, augment))


def test_adm_ends_with_out_norm_and_out_conv():
    """F = out_conv silu out_norm h, eps = 1e-5: with the last block known, by definition."""
    net, kept = adm().double().model, []
    net.dec["8x8_block1"].register_forward_hook(lambda m, i, out: kept.append(out))
    x, c = torch.randn(2, 3, 8, 8).double(), torch.randn(2).double()
    result, features = net(x, c, return_features=True)
    assert_close(result, conv(F.silu(norm(kept[0], net.out_norm, 1e-5)), net.out_conv))
    assert [tuple(f.shape) for f in features] == [(2, 64, 8, 8), (2, 128, 4, 4)]


def test_adm_starts_uniform_with_last_layers_zero():
    """Uniform within 1 / sqrt(fan_in); conv1, proj, out_conv, map_augment 0; labels N(0, 1)."""
    torch.manual_seed(0)
    net = edm.DhariwalUNet(**ADM)
    block = net.enc["4x4_block0"]
    for layer in (block.conv0, block.affine, block.qkv, block.skip, net.map_layer0):
        bound = 1 / math.sqrt(layer.weight[0].numel())
        for p in layer.parameters():
            assert 0.9 * bound < p.abs().max() <= bound
        assert_close(layer.weight.std().item(), bound / math.sqrt(3), rtol=0.05, atol=0)
    for layer in (block.conv1, block.proj, net.out_conv, net.map_augment):
        assert all((p == 0).all() for p in layer.parameters())
    assert_close(net.map_label.weight.std().item(), 1.0, rtol=0.1, atol=0)


def test_trainable_copy_of_adm_has_no_dropout_of_any_kind():
    net = adm(label_dropout=1.0)
    twin = edm.trainable_copy(net).train()
    x, labels = torch.randn(2, 3, 8, 8), torch.tensor([0, 3])
    assert_close(twin(x, 1.0, labels), net(x, 1.0, labels), rtol=0, atol=0)
    net.train()
    assert_close(net.model.drop_labels(torch.ones(2, 4)), torch.zeros(2, 4))


@pytest.mark.parametrize("make", [song, adm])
def test_both_networks_are_saved_and_loaded(tmp_path, make):
    net = make()
    edm.save_denoiser(net, tmp_path / "d.safetensors")
    again = edm.load_denoiser(tmp_path / "d.safetensors")
    assert type(again.model) is type(net.model)
    assert_same(net, again)


def test_files_without_a_type_are_ddpmpp(tmp_path):
    net = song()
    config = {"network": net.model.config, "sigma_data": 0.5}
    edm.save_tensors(tmp_path / "old.safetensors", net.state_dict(), config)
    assert_same(net, edm.load_denoiser(tmp_path / "old.safetensors"))


def test_200_flipped_bits_of_our_files_are_noticed(tmp_path):
    path = tmp_path / "d.safetensors"
    edm.save_denoiser(song(), path)
    data, pick = path.read_bytes(), random.Random(0)
    for _ in range(200):
        broken = bytearray(data)
        broken[pick.randrange(len(data))] ^= 1 << pick.randrange(8)
        path.write_bytes(broken)
        with pytest.raises(ValueError, match=r"^.+$"):
            edm.load_denoiser(path)


# ---------------------------------------------------------------- pickles of NVlabs/edm


class EasyDict(dict):
    """Pickled as dnnlib.util's of the same name."""


def _reconstruct_persistent_obj(meta):
    raise AssertionError("was called")


class Persistent:
    """Pickled as NVlabs' persistent classes are: a name, a source text that is not run, a state."""

    def __init__(self, class_name, state):
        self.meta = {"type": "class", "version": 6, "module_src": "raise SystemExit"}
        self.meta |= {"class_name": class_name, "state": state}

    def __reduce__(self):
        return _reconstruct_persistent_obj, (self.meta,)


@pytest.fixture
def dump(monkeypatch):
    """pickle.dumps with the throw-away modules in place; they are gone when a file is read."""

    def dump(value, protocol=4):
        with monkeypatch.context() as patch:
            for name, item in [
                ("torch_utils.persistence", _reconstruct_persistent_obj),
                ("dnnlib.util", EasyDict),
            ]:
                module = types.ModuleType(name)
                setattr(module, item.__name__, item)
                patch.setitem(sys.modules, name.split(".")[0], types.ModuleType(name))
                patch.setitem(sys.modules, name, module)
                patch.setattr(item, "__module__", name)
            return pickle.dumps(value, protocol)

    return dump


def persistent(module, class_name=None, **state):
    """A module of ours as a genuine pickle has it, down to the leaves."""
    parts = {name: persistent(child) for name, child in module._modules.items() if child}
    if isinstance(module, nn.ModuleDict):
        container = nn.ModuleDict()
        container.__dict__["_modules"] = parts
        return container
    state |= {
        "training": False,
        "_parameters": collections.OrderedDict(module._parameters),
        "_buffers": collections.OrderedDict(module._buffers),
        "_non_persistent_buffers_set": set(),
        "_backward_hooks": collections.OrderedDict(),
        "_modules": collections.OrderedDict(parts),
        "skip_scale": np.sqrt(0.5),
        "eps": np.float32(1e-6),
    }
    return Persistent(class_name or type(module).__name__, state)


def toy(denoiser, class_name="EDMPrecond", **changes):
    """A network as NVlabs pickles it, with the keyword arguments that its training gave."""
    kwargs = {k: v for k, v in denoiser.model.config.items() if k != "patch_size"}
    kwargs |= {"model_type": type(denoiser.model).__name__, "use_fp16": True}
    if isinstance(denoiser.model, edm.SongUNet):
        kwargs |= edm.DDPMPP
    kwargs |= changes
    net = persistent(denoiser, class_name, _init_args=(), _init_kwargs=EasyDict(kwargs))
    net.meta["state"]["_buffers"]["cache"] = torch.ones(1)  # not in a state dict
    net.meta["state"]["_non_persistent_buffers_set"] = {"cache"}
    parts = net.meta["state"]["_modules"]["model"].meta["state"]["_modules"]
    parts["map_noise"] = Persistent("PositionalEmbedding", persistent(nn.Identity()).meta["state"])
    return net


def snapshot(network):
    loss = Persistent("EDMLoss", {"P_mean": -1.2, "P_std": 1.2, "sigma_data": 0.5})
    return {
        "ema": network,
        "loss_fn": loss,
        "augment_pipe": None,
        "dataset_kwargs": EasyDict(path="cifar10-32x32.zip", xflip=False, max_size=50000),
    }


def write(path, data):
    path.write_bytes(data)
    return path


@pytest.mark.parametrize("make", [song, adm])
@pytest.mark.parametrize("wrap", ["snapshot", "model", "bare"])
def test_a_pickle_is_read_bit_identically(tmp_path, dump, make, wrap):
    net = make()
    wrapped = {"snapshot": snapshot, "model": lambda v: {"model": v}, "bare": lambda v: v}[wrap]
    again = edm.load_denoiser(write(tmp_path / "net.pkl", dump(wrapped(toy(net)))))
    assert type(again.model) is type(net.model)
    assert_same(net, again)
    assert not again.training
    edm.save_denoiser(again, tmp_path / "again.safetensors")
    assert_same(net, edm.load_denoiser(tmp_path / "again.safetensors"))


def test_unconditional_networks_positional_arguments_and_half_precision(tmp_path, dump):
    """EDMPrecond(8, 1, model_type=...), weights in float16: read as float32."""
    net = song(label_dim=0)
    value = toy(net.half())
    state = value.meta["state"]
    for name in ("img_resolution", "img_channels"):
        state["_init_args"] += (state["_init_kwargs"].pop(name),)
    again = edm.load_denoiser(write(tmp_path / "net.pkl", dump(value, protocol=5)))
    assert next(again.parameters()).dtype == torch.float32
    assert_same(net.float(), again)


@pytest.mark.parametrize("name", ["VPPrecond", "VEPrecond", "iDDPMPrecond", "Precond"])
def test_other_preconditionings_are_refused_by_name(tmp_path, dump, name):
    path = write(tmp_path / "net.pkl", dump(snapshot(toy(song(), name))))
    with pytest.raises(ValueError, match=f"'{name}', and only EDMPrecond is implemented"):
        edm.load_denoiser(path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"embedding_type": "fourier", "encoder_type": "residual"}, "embedding_type='fourier'"),
        ({"resample_filter": [1, 3, 3, 1]}, "resample_filter="),
        ({"colour": "red"}, "colour='red'"),
        ({"model_type": "DiT"}, "DiT"),
        ({"sigma_max": 10.0}, "noise levels are from 0 to 10.0"),
        ({"sigma_min": torch.ones(9)}, "sigma_min is no number"),
        ({"num_blocks": 2}, "tensor model.* is (missing|unexpected)"),
        ({"num_blocks": 10**9}, "more blocks than tensors"),
        ({"model_channels": 2**20}, "has shape"),
        ({"model_channels": "8"}, "does not describe"),
        ({"channel_mult": []}, "tensor model.* is unexpected"),
        ({"img_resolution": 8.5}, "does not describe"),
        ({"dropout": [[1.0]]}, "dropout is no number"),
    ],
)
def test_arguments_that_are_not_implemented_are_refused(tmp_path, dump, changes, message):
    path = write(tmp_path / "net.pkl", dump(snapshot(toy(song(), **changes))))
    with pytest.raises(ValueError, match=message) as error:
        edm.load_denoiser(path)
    assert "\n" not in str(error.value)


def test_adm_names_unknown_arguments_too(tmp_path, dump):
    path = write(tmp_path / "net.pkl", dump(toy(adm(), encoder_type="residual")))
    with pytest.raises(ValueError, match="encoder_type"):
        edm.load_denoiser(path)


def test_another_resampling_filter_is_refused(tmp_path, dump):
    net = song()
    net.model.enc["4x4_down"].conv0.resample_filter.copy_(torch.tensor([[0.5, 0.5], [0, 0]]))
    with pytest.raises(ValueError, match="resample_filter is not the mean"):
        edm.load_denoiser(write(tmp_path / "net.pkl", dump(toy(net))))


# ---------------------------------------------------------------- hostile pickles


class Call:
    """Pickled as a call of function(*args)."""

    def __init__(self, function, *args):
        self.call = function, args

    def __reduce__(self):
        return self.call


def touch(marker):
    return f"touch {marker}"


CALLS = {
    "os.system": lambda m: Call(os.system, touch(m)),
    "os.popen": lambda m: Call(os.popen, touch(m)),
    "eval": lambda m: Call(eval, f"open({str(m)!r}, 'w')"),
    "exec": lambda m: Call(exec, f"open({str(m)!r}, 'w')"),
    "open": lambda m: Call(open, str(m), "w"),
    "Popen": lambda m: Call(subprocess.Popen, ["touch", str(m)]),
    "__import__": lambda m: Call(__import__, "antigravity"),
    "getattr": lambda m: Call(getattr, "", "join"),
    "attrgetter": lambda m: Call(operator.attrgetter, "system"),
    "methodcaller": lambda m: Call(operator.methodcaller, "system", touch(m)),
    "nested": lambda m: Call(collections.OrderedDict, [("a", Call(os.system, touch(m)))]),
    "map": lambda m: Call(list, Call(map, os.system, [touch(m)])),
    "torch.load": lambda m: Call(torch.load, str(m)),
    "numpy.load": lambda m: Call(np.load, str(m), None, True),
    "pickle.loads": lambda m: Call(pickle.loads, pickle.dumps(Call(os.system, touch(m)))),
    "array of objects": lambda m: np.array([Call(os.system, touch(m))], dtype=object),
    "class": lambda m: Call(type, "X", (), {}),
    "state of a class": lambda m: make_denoiser(TINY),
    "code": lambda m: types.SimpleNamespace(a=1),
}


def stored_bytes(value):
    """What torch.storage._load_from_bytes gets: a torch.save() in the old format."""
    data = io.BytesIO()
    torch.save(value, data, _use_new_zipfile_serialization=False)
    return data.getvalue()


EXECUTED = []  # what Python itself reports: an audit hook cannot be removed, nor deceived


@sys.addaudithook
def watch(event, arguments):
    if event in ("os.system", "subprocess.Popen", "os.posix_spawn", "os.exec", "pickle.find_class"):
        EXECUTED.append((event, arguments))


def refuse(path):
    """The error, after the checks that every refusal has to pass: one line, nothing executed."""
    EXECUTED.clear()
    with pytest.raises(ValueError, match=r"^.+$") as error:
        edm.load_denoiser(path)
    assert len(str(error.value)) < 500
    assert EXECUTED == []
    return str(error.value)


@pytest.mark.parametrize("kind", CALLS)
@pytest.mark.parametrize("where", ["alone", "beside", "inside", "argument"])
def test_calls_in_a_pickle_are_refused_and_not_executed(tmp_path, dump, kind, where):
    marker = tmp_path / "marker"
    call, value = CALLS[kind](marker), snapshot(toy(small_song()))
    if where == "alone":
        value = call
    elif where == "beside":
        value["loss_fn"] = call
    elif where == "inside":
        value["ema"].meta["state"]["_modules"]["model"].meta["state"]["extra"] = call
    else:
        value["ema"].meta["state"]["_init_kwargs"]["dropout"] = call
    message = refuse(write(tmp_path / "net.pkl", dump(value)))
    assert "it names" in message
    assert not marker.exists()


@pytest.mark.parametrize("inner", ["torch.save", "plain", "zip", "tensor", "text"])
def test_what_a_storage_is_read_from_is_data_too(tmp_path, dump, inner):
    """torch.storage._load_from_bytes is a torch.load: with weights_only, of a storage only."""
    marker = tmp_path / "marker"
    call, data = Call(os.system, touch(marker)), io.BytesIO()
    torch.save({"a": call}, data)
    data = {
        "torch.save": stored_bytes([call]),
        "plain": pickle.dumps(call),
        "zip": data.getvalue(),
        "tensor": stored_bytes(torch.ones(3)),
        "text": b"hello",
    }[inner]
    value = snapshot(toy(small_song()))
    value["loss_fn"] = Call(torch.storage._load_from_bytes, data)
    refuse(write(tmp_path / "net.pkl", dump(value)))
    assert not marker.exists()


def scalar(kind, data):
    return Call(np._core.multiarray.scalar, kind, data)


BAD_VALUES = {
    "object scalar": lambda: scalar(np.dtype("O"), pickle.dumps(Call(os.system, "false"))),
    "scalar of another size": lambda: scalar(np.dtype("f8"), b"123"),
    "void scalar": lambda: scalar(np.dtype("V8"), b"12345678"),
    "shape without storage": lambda: rebuild((2**40,), (1,)),
    "stride beyond the storage": lambda: rebuild((2, 2), (2**40, 1)),
    "offset beyond the storage": lambda: rebuild((2,), (1,), offset=2**62),
    "negative stride": lambda: rebuild((2,), (-1,)),
    "negative size": lambda: rebuild((-2,), (1,)),
    "overflow": lambda: rebuild((2**32, 2**32), (2**32, 2**32)),
    "tensor of no storage": lambda: Call(torch._utils._rebuild_tensor_v2, 1, 0, (), (), False, {}),
    "key that is a tuple": lambda: {(1, 2): 3},
    "no name": lambda: Persistent(["EDMPrecond"], {}),
}


def rebuild(size, stride, offset=0):
    storage = torch.ones(4).storage()
    return Call(torch._utils._rebuild_tensor_v2, storage, offset, size, stride, False, {})


@pytest.mark.filterwarnings("ignore:TypedStorage")
@pytest.mark.parametrize("kind", BAD_VALUES)
def test_values_outside_their_bounds_are_refused(tmp_path, dump, kind):
    value = snapshot(toy(small_song()))
    value["loss_fn"] = BAD_VALUES[kind]()
    refuse(write(tmp_path / "net.pkl", dump(value)))


def test_a_stretched_tensor_of_any_size_costs_no_memory(tmp_path, dump):
    """Stride 0 is within the storage; the shape is not the network's."""
    value = snapshot(toy(small_song()))
    part = value["ema"].meta["state"]["_modules"]["model"].meta["state"]["_modules"]["map_layer0"]
    part.meta["state"]["_parameters"]["bias"] = torch.ones(1).expand(2**50)
    assert "has shape (1125899906842624,)" in refuse(write(tmp_path / "net.pkl", dump(value)))


FUNCTION = b"ctorch._utils\n_rebuild_tensor_v2\n"
HEAD = b"\x80\x04"
ASSEMBLED = {
    "os.system, protocol 0": b"cos\nsystem\n(S'false'\ntR.",
    "os.system by INST": b"(S'false'\nios\nsystem\n.",
    "os.system by OBJ": HEAD + b"(cos\nsystem\nU\x05falseo.",
    "STACK_GLOBAL": HEAD + b"\x8c\x05posix\x8c\x06system\x93\x8c\x05false\x85R.",
    "STACK_GLOBAL of no names": HEAD + b"K\x01K\x02\x93.",
    "a dotted name": HEAD + b"\x8c\x0bcollections\x8c\x16OrderedDict.fromkeys.x\x93.",
    "an attribute of a function": HEAD + b"ctorch._utils\n_rebuild_tensor_v2.__globals__\n.",
    "EXT1": HEAD + b"\x82\x01.",
    "EXT2": HEAD + b"\x83\x01\x00.",
    "EXT4": HEAD + b"\x84\x01\x00\x00\x00.",
    "persistent id": b"Pabc\n.",
    "binary persistent id": HEAD + b"K\x01Q.",
    "NEWOBJ_EX": HEAD + FUNCTION + b")}\x92.",
    "BUILD on a function": HEAD + FUNCTION + b"}b.",
    "BUILD attributes of a function": HEAD + FUNCTION + b"N}\x8c\x0c__defaults__)s\x86b.",
    "BUILD on a dict": HEAD + b"}}b.",
    "call of a string": HEAD + b"\x8c\x04evil)R.",
    "call of an object": HEAD + b"ctorch.nn.modules.container\nModuleDict\n)\x81)R.",
    "bytearray of 2^62 bytes": b"\x80\x05\x96" + struct.pack("<Q", 2**62) + b"x.",
    "bytes of 2^62": HEAD + b"\x8e" + struct.pack("<Q", 2**62) + b"x.",
    "string of 2^40": HEAD + b"\x8d" + struct.pack("<Q", 2**40) + b"x.",
    "number of 2^31 bytes": HEAD + b"\x8b" + struct.pack("<i", 2**31 - 1) + b"x.",
    "frame of 2^62": HEAD + b"\x95" + struct.pack("<Q", 2**62) + b"N.",
    "memo index 2^31": HEAD + b"Nr" + struct.pack("<I", 2**31) + b".",
    "memo index never set": HEAD + b"j" + struct.pack("<I", 7) + b".",
    "deep tuple": HEAD + b")" + b"\x85" * 200_000 + b".",
    "deep tuple as a key": HEAD + b"})" + b"\x85" * 200_000 + b"Ns.",
    "deep tuple in a set": HEAD + b"\x8f()" + b"\x85" * 200_000 + b"\x90.",
    "deep tuple as a kind of number": HEAD + b"cnumpy\ndtype\n)" + b"\x85" * 200_000 + b"\x85R.",
    "nothing on the stack": HEAD + b".",
    "no mark": HEAD + b"e.",
    "no end": HEAD + b"N",
    "empty": b"",
    "text": b"hello",
    "zip": b"PK\x03\x04" + bytes(100),
}


@pytest.mark.parametrize("kind", ASSEMBLED)
def test_hostile_instructions_are_refused(tmp_path, kind):
    message = refuse(write(tmp_path / "net.pkl", ASSEMBLED[kind]))
    if "BUILD" in kind:
        assert "it changes a" in message


def test_instructions_are_counted(tmp_path, monkeypatch):
    monkeypatch.setattr(edm, "MAX_INSTRUCTIONS", 1000)
    assert "1000 instructions" in refuse(write(tmp_path / "net.pkl", HEAD + b"N" * 1000 + b"."))


def test_numbers_of_numpy_are_read(dump):
    """genuine files have np.sqrt(0.5) as skip_scale; files of big-endian machines are right too."""
    numbers = [np.sqrt(0.5), np.float32(0.1), np.int64(-3), np.int32(7), np.bool_(True)]
    assert edm.read_pickle(dump(numbers)) == [n.item() for n in numbers]
    kind = edm.Stored("f8", (3, ">", None, None, None, -1, -1, 0))
    assert edm.stored_number(kind, struct.pack(">d", 0.1)) == 0.1


def test_a_module_within_itself_and_2_to_the_60_modules_are_refused(tmp_path, dump):
    def module(**children):
        return Persistent("X", {"_parameters": {}, "_buffers": {}, "_modules": children})

    net = module()
    for _ in range(60):
        net = module(a=net, b=net)
    net.meta["class_name"] = "EDMPrecond"
    assert "twice" in refuse(write(tmp_path / "net.pkl", dump(net)))


def test_modules_deeper_than_python_can_follow_are_refused(tmp_path):
    begin = b"ctorch_utils.persistence\n_reconstruct_persistent_obj\n}\x8c\x0aclass_name"
    begin += b"\x8c\x0aEDMPreconds\x8c\x05state}\x8c\x0b_parameters}s\x8c\x08_buffers}s"
    begin += b"\x8c\x08_modules}\x8c\x01a"
    data = HEAD + 3000 * begin + b"N" + 3000 * b"sss\x85R" + b"."
    assert "Recursion" in refuse(write(tmp_path / "net.pkl", data))


def test_lists_with_a_short_file_and_an_endless_repr_are_not_printed(tmp_path, dump):
    bomb = ["x"]
    for _ in range(60):
        bomb = [bomb, bomb]
    for value in (bomb, Persistent("EDMPrecond", bomb), toy(small_song(), colour=bomb)):
        refuse(write(tmp_path / "net.pkl", dump(value)))


def test_a_truncated_pickle_is_refused(tmp_path, dump):
    data = dump(snapshot(toy(small_song(), dropout=0.0)))
    for size in range(0, len(data) - 1, len(data) // 60):
        refuse(write(tmp_path / "net.pkl", data[:size]))


def test_200_flipped_bits_of_a_pickle_give_a_denoiser_or_an_error(tmp_path, dump):
    """A pickle has no checksum: a flipped weight goes unnoticed. Nothing else happens."""
    data, pick, loaded = dump(snapshot(toy(small_song()))), random.Random(0), 0
    before = set(sys.modules)
    EXECUTED.clear()
    for _ in range(200):
        broken = bytearray(data)
        broken[pick.randrange(len(data))] ^= 1 << pick.randrange(8)
        path = write(tmp_path / "net.pkl", broken)
        try:
            loaded += isinstance(edm.load_denoiser(path), edm.EDMPrecond)
        except ValueError:
            refuse(path)
    assert 0 < loaded < 200
    assert set(sys.modules) == before
    assert EXECUTED == []


def test_the_watch_sees_what_pickle_would_execute():
    EXECUTED.clear()
    pickle.loads(pickle.dumps(Call(os.system, "true")))
    assert {event for event, _ in EXECUTED} == {"os.system", "pickle.find_class"}


# ---------------------------------------------------------------- FastGen's .pth


@pytest.mark.parametrize("make", [song, adm])
@pytest.mark.parametrize("change", [{}, {"label_dim": 0, "augment_dim": 0}])
def test_fastgen_teacher_is_its_state_dict(tmp_path, make, change):
    """Names and shapes tell the arguments; dropout and label dropout are not in the file."""
    net = make(**change)
    torch.save(net.state_dict(), tmp_path / "edm.pth")
    again = edm.load_denoiser(tmp_path / "edm.pth")
    unknown = {"dropout": 0.0, "label_dropout": 0.0}
    assert again.model.config | unknown == net.model.config | unknown
    assert_same(net, again)


def test_fastgen_training_checkpoint_gives_its_first_moving_average(tmp_path):
    """{"model": {"net": ..., "ema_...": ...}, ...}; its logvar_linear has no part in denoising."""
    net, ema = song(), song()
    randomise(ema, seed=5)
    state = {k: v.state_dict() for k, v in {"net": net, "fake_score": net, "ema_9999": ema}.items()}
    for part in state.values():
        part["model.logvar_linear.weight"] = torch.ones(1, 8)
        part["model.logvar_linear.bias"] = torch.ones(1)
    rest = {"optimizer": {"net": {"state": {}}}, "scheduler": None, "iteration": 7}
    torch.save({"model": state} | rest, tmp_path / "0000007.pth")
    assert_same(ema, edm.load_denoiser(tmp_path / "0000007.pth"))
    del state["ema_9999"]
    torch.save({"model": state} | rest, tmp_path / "0000007.pth")
    assert_same(net, edm.load_denoiser(tmp_path / "0000007.pth"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("model.map_layer0.weight"), "'map_layer0.weight' is missing"),
        (lambda s: s.pop("model.enc.8x8_conv.weight"), "8x8_conv.weight'"),
        (lambda s: s.pop("model.map_layer0.bias"), "model.map_layer0.bias is missing"),
        (lambda s: s.update(more=torch.ones(1)), "more is unexpected"),
        (lambda s: s.update({"model.map_layer0.bias": 1}), "no attribute 'shape'"),
        (lambda s: s.update({"model.map_layer0.bias": torch.ones(32).int()}), "floating-point"),
        (lambda s: s.update({"model.map_layer0.bias": torch.ones(32).to_sparse()}), "floating"),
        (lambda s: s.update({"model.map_layer0.bias": torch.ones(32, device="meta")}), "floating"),
        (lambda s: s.update({"model.enc.8x8_block7777777.conv0.weight": torch.ones(1)}), "blocks"),
        (lambda s: s.update(x=Call(os.system, "false")), "damaged or no .pth"),
        (lambda s: s.clear(), "'map_layer0.weight' is missing"),
    ],
)
def test_other_pth_files_are_refused(tmp_path, change, message):
    state = song().state_dict()
    change(state)
    torch.save(state, tmp_path / "net.pth")
    assert message in refuse(tmp_path / "net.pth")


@pytest.mark.parametrize("data", [b"", b"hello", pickle.dumps(Call(os.system, "false"))])
def test_pth_files_that_are_none_are_refused(tmp_path, data):
    assert "damaged or no .pth" in refuse(write(tmp_path / "net.pth", data))
