"""Files of others: ADM's network, NVlabs/edm's pickles read as data alone, FastGen's .pth.

There is no genuine file here and no text of NVlabs: the pickles are made of the networks of this
project, with the structure of a genuine one, through a throw-away `torch_utils.persistence`.
"""

import collections
import functools
import io
import math
import os
import pickle
import pkgutil
import random
import struct
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
from backbones import edm_files
from backbones.edm_files import ADMBlock, DhariwalUNet, load_denoiser

SONG = TINY | {"patch_size": 1, "augment_dim": 3, "attn_resolutions": [4], "model_channels": 8}
ADM = {"img_resolution": 8, "img_channels": 3, "label_dim": 4, "augment_dim": 3}
ADM |= {"model_channels": 64, "channel_mult": [1, 2], "num_blocks": 1, "attn_resolutions": [4]}


def song(**changes):
    torch.manual_seed(0)
    return randomise(make_denoiser(SONG | changes)).eval()


def small_song():
    return song(channel_mult=[1], num_blocks=0, label_dim=0, augment_dim=0)


def adm(**changes):
    torch.manual_seed(0)
    return randomise(edm.EDMPrecond(DhariwalUNet(**(ADM | changes)))).eval()


def assert_same(a, b):
    """The same network, the same keys in the same order, the same bits, the same answer."""
    one, other = a.state_dict(), b.state_dict()
    assert type(a.model) is type(b.model)
    assert list(one) == list(other)
    assert all(torch.equal(v, other[k]) for k, v in one.items())
    x = torch.randn(2, *a.shape, generator=torch.Generator().manual_seed(0))
    sigma, labels = torch.tensor([0.1, 9.0]), torch.tensor([1, -1]) if a.label_dim else None
    assert torch.equal(a(x, sigma, labels), b(x, sigma, labels))


# ---------------------------------------------------------------- the ADM network


def test_imagenet64_configuration_has_the_published_size():
    with torch.device("meta"):
        net = DhariwalUNet(64, 3, 1000)
        narrow = DhariwalUNet(8, 3, model_channels=32, channel_mult=[2, 4])
    assert sum(p.numel() for p in net.parameters()) == 295_899_267
    state = net.state_dict()
    assert len(state) == 553
    for name, shape in [
        ("map_label.weight", (768, 1000)),
        ("enc.64x64_conv.weight", (192, 3, 3, 3)),
        ("enc.32x32_down.skip.resample_filter", (1, 1, 2, 2)),
        ("enc.32x32_block0.skip.weight", (384, 192, 1, 1)),
        ("enc.32x32_block1.affine.weight", (768, 768)),
        ("dec.8x8_in0.qkv.weight", (2304, 768, 1, 1)),
        ("dec.32x32_block2.proj.bias", (384,)),
    ]:
        assert tuple(state[name].shape) == shape
    for name in ("map_label.bias", "enc.64x64_block0.qkv.weight", "enc.32x32_down.skip.weight"):
        assert name not in state
    # the first convolution has the width of its level, unlike DDPM++'s
    assert len(narrow.enc["8x8_conv"].weight) == 64


def norm(v, layer, eps=1e-5):
    """Group normalisation by its definition: 32 groups or fewer, of 4 channels or more."""
    g = v.reshape(len(v), min(32, v.shape[1] // 4), -1)
    g = (g - g.mean(2, keepdim=True)) / (g.var(2, keepdim=True, correction=0) + eps).sqrt()
    return g.reshape(v.shape) * layer.weight[:, None, None] + layer.bias[:, None, None]


def conv(x, layer):
    return F.conv2d(x, layer.weight, layer.bias, padding=layer.weight.shape[-1] // 2)


@pytest.mark.parametrize("cout", [8, 16])
@pytest.mark.parametrize("resample", [None, "up", "down"])
def test_adm_block_scales_and_shifts_and_adds_without_a_factor(resample, cout):
    """skip r x + conv1 silu(norm1(conv0 r silu norm0 x) (scale + 1) + shift), eps = 1e-5.

    r: nearest neighbour up, mean of 2 x 2 down, or nothing. The skip has weights to another width.
    """
    torch.manual_seed(0)
    block = randomise(ADMBlock(8, cout, 16, 0.0, **({resample: True} if resample else {}))).double()
    x, emb = torch.randn(2, 8, 4, 4).double() * 1e-2, torch.randn(2, 16).double()  # eps matters
    r = {
        None: lambda v: v,
        "up": lambda v: v.repeat_interleave(2, 2).repeat_interleave(2, 3),
        "down": lambda v: v.unflatten(3, (-1, 2)).unflatten(2, (-1, 2)).mean((3, 5)),
    }[resample]
    h = conv(r(F.silu(norm(x, block.norm0))), block.conv0)
    scale, shift = (emb @ block.affine.weight.T + block.affine.bias)[:, :, None, None].chunk(2, 1)
    h = conv(F.silu(norm(h, block.norm1) * (scale + 1) + shift), block.conv1)
    assert ("skip.weight" in block.state_dict()) == (cout == 16)
    assert_close(block(x, emb), (r(x) if cout == 8 else conv(r(x), block.skip)) + h)


def test_adm_attention_has_a_head_per_64_channels_each_interleaved():
    """Channel c of head h: q, k, v at 3 (64 h + c) + {0, 1, 2}; softmax(q k / 8); no factor."""
    torch.manual_seed(0)
    block = randomise(ADMBlock(128, 128, 16, 0.0, attention=True)).double()
    x, emb = torch.randn(2, 128, 3, 3).double(), torch.randn(2, 16).double()
    block.attention = False
    h = block(x, emb)
    block.attention = True
    qkv = conv(norm(h, block.norm2), block.qkv).flatten(2)
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
        net = DhariwalUNet(**ADM)
        narrow = DhariwalUNet(**(ADM | {"model_channels": 16}))
    blocks = {k for k, m in net.named_modules() if getattr(m, "attention", False)}
    assert blocks == {"enc.4x4_block0", "dec.4x4_in0", "dec.4x4_block0", "dec.4x4_block1"}
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
    """F = out_conv silu out_norm h, eps = 1e-5: with a last block of known, small h."""
    net, h = adm().double().model, torch.randn(2, 64, 8, 8).double() * 1e-2
    net.dec["8x8_block1"].register_forward_hook(lambda *_: h)
    x, c = torch.randn(2, 3, 8, 8).double(), torch.randn(2).double()
    result, features = net(x, c, return_features=True)
    assert_close(result, conv(F.silu(norm(h, net.out_norm)), net.out_conv))
    assert [tuple(f.shape) for f in features] == [(2, 64, 8, 8), (2, 128, 4, 4)]


def test_adm_starts_uniform_with_last_layers_zero():
    """Uniform within 1 / sqrt(fan_in); conv1, proj, out_conv, map_augment 0; labels N(0, 1)."""
    torch.manual_seed(0)
    net = DhariwalUNet(**ADM)
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
    embed, c = net.train().model.embed, torch.ones(2)
    assert_close(embed(c, torch.ones(2, 4), None), embed(c, None, None), rtol=0, atol=0)


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
def dump(tmp_path, monkeypatch):
    """Pickles to a file with the throw-away modules in place; they are gone when it is read."""

    def dump(value, protocol=4):
        with monkeypatch.context() as patch:
            for name, item in [
                ("torch_utils.persistence", _reconstruct_persistent_obj),
                ("dnnlib.util", EasyDict),
            ]:
                module = types.SimpleNamespace(**{item.__name__: item})
                patch.setitem(sys.modules, name.split(".")[0], module)
                patch.setitem(sys.modules, name, module)
                patch.setattr(item, "__module__", name)
            return write(tmp_path / "net.pkl", pickle.dumps(value, protocol))

    return dump


def write(path, data):
    path.write_bytes(data)
    return path


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
    kwargs |= {} if isinstance(denoiser.model, DhariwalUNet) else edm_files.DDPMPP
    kwargs |= changes
    net = persistent(denoiser, class_name, _init_args=(), _init_kwargs=EasyDict(kwargs))
    net.meta["state"]["_buffers"]["cache"] = torch.ones(1)  # not in a state dict
    net.meta["state"]["_non_persistent_buffers_set"] = {"cache"}
    parts = net.meta["state"]["_modules"]["model"].meta["state"]["_modules"]
    parts["map_noise"] = Persistent("PositionalEmbedding", persistent(nn.Identity()).meta["state"])
    return net


def snapshot(network, **more):
    loss = Persistent("EDMLoss", {"P_mean": -1.2, "P_std": 1.2, "sigma_data": 0.5})
    data = EasyDict(path="cifar10-32x32.zip", xflip=False, max_size=50000)
    return {"ema": network, "loss_fn": loss, "augment_pipe": None, "dataset_kwargs": data} | more


@pytest.mark.parametrize("make", [song, adm])
@pytest.mark.parametrize("wrap", [snapshot, lambda net: {"model": net}, lambda net: net])
def test_a_pickle_is_read_bit_identically_and_so_is_what_is_saved_of_it(tmp_path, dump, make, wrap):
    net = make()
    again = load_denoiser(dump(wrap(toy(net))))
    assert_same(net, again)
    assert not again.training
    edm.save_denoiser(again, tmp_path / "again.safetensors")
    assert_same(net, load_denoiser(tmp_path / "again.safetensors"))


def test_files_without_a_type_are_ddpmpp(tmp_path):
    net = song()
    config = {"network": net.model.config, "sigma_data": 0.5}
    edm.save_tensors(tmp_path / "old.safetensors", net.state_dict(), config)
    assert_same(net, load_denoiser(tmp_path / "old.safetensors"))


def test_unconditional_networks_positional_arguments_and_half_precision(dump):
    """EDMPrecond(8, 1, model_type=...), weights in float16: read as float32."""
    net = song(label_dim=0)
    value = toy(net.half())
    state = value.meta["state"]
    for name in ("img_resolution", "img_channels"):
        state["_init_args"] += (state["_init_kwargs"].pop(name),)
    again = load_denoiser(dump(value, protocol=5))
    assert next(again.parameters()).dtype == torch.float32
    assert_same(net.float(), again)


def test_numbers_of_numpy_are_read(dump):
    """Genuine files have np.sqrt(0.5) as skip_scale; files of big-endian machines are right too."""
    numbers = [np.sqrt(0.5), np.float32(0.1), np.int64(-3), np.int32(7), np.bool_(True)]
    path = dump([*numbers, scalar(np.dtype(">f8"), struct.pack(">d", 0.1))])
    found = edm_files.Reader(io.BytesIO(path.read_bytes()), edm_files.KNOWN, 10**4).load()
    assert found == [*(n.item() for n in numbers), 0.1]


# ---------------------------------------------------------------- hostile pickles
EXECUTED = []  # what Python itself reports: an audit hook cannot be removed, nor deceived


@sys.addaudithook
def watch(event, arguments):
    if event in ("os.system", "subprocess.Popen", "os.posix_spawn", "os.exec", "pickle.find_class"):
        EXECUTED.append((event, arguments))


def refuse(path):
    """The error, after the checks that every refusal has to pass: one line, nothing executed."""
    EXECUTED.clear()
    with pytest.raises(ValueError, match=r"^.+$") as error:
        load_denoiser(path)
    assert len(str(error.value)) < 500
    assert EXECUTED == []
    return str(error.value)


def test_the_watch_sees_what_pickle_would_execute():
    EXECUTED.clear()
    pickle.loads(pickle.dumps(Call(os.system, "true")))
    assert {event for event, _ in EXECUTED} == {"os.system", "pickle.find_class"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"embedding_type": "fourier", "encoder_type": "residual"}, "another embedding_type"),
        ({"resample_filter": [1, 3, 3, 1]}, "another resample_filter"),
        ({"embedding_type": ["x" * 10**5] * 10**4}, "another embedding_type"),
        ({"model_type": "DhariwalUNet"}, "embedding_type is no number"),  # ADM has no such thing
        ({"model_type": "DiT"} | dict.fromkeys(edm_files.DDPMPP, 1), "DiT"),
        ({"model_type": ["SongUNet"]}, "model_type is no name"),
        ({"colour": 1}, "colour"),
        ({"sigma_max": 10.0}, "noise levels are from 0 to 10.0"),
        ({"sigma_min": torch.ones(9)}, "sigma_min is no number"),
        ({"num_blocks": 2}, "has shape"),
        ({"num_blocks": 10**9}, "more blocks than tensors"),
        ({"model_channels": 2**20}, "has shape"),
        ({"model_channels": "8", "channel_mult_emb": 2**40}, "model_channels is no number"),
        ({"channel_mult": []}, "has shape"),
        ({"channel_mult": [0] * 10**5}, "channel_mult is no number or short list"),
        ({"img_resolution": 8.5}, "does not describe"),
        ({"dropout": [[1.0]]}, "dropout is no number"),
        ({"x" * 101: 1}, "a key that is no name"),
        ({"class_name": "VPPrecond"}, "'VPPrecond', and only EDMPrecond is implemented"),
        ({"class_name": "VEPrecond"}, "'VEPrecond', and only EDMPrecond is implemented"),
        ({"class_name": "iDDPMPrecond"}, "'iDDPMPrecond', and only EDMPrecond is implemented"),
        ({"class_name": "Precond"}, "'Precond', and only EDMPrecond is implemented"),
    ],
)
def test_arguments_that_are_not_implemented_are_refused(dump, changes, message):
    assert message in refuse(dump(snapshot(toy(song(), **changes))))


def test_another_resampling_filter_is_refused(dump):
    net = song()
    net.model.enc["4x4_down"].conv0.resample_filter.copy_(torch.tensor([[0.5, 0.5], [0, 0]]))
    assert "resample_filter is not the mean" in refuse(dump(toy(net)))


class Call:
    """Pickled as a call of function(*args)."""

    def __init__(self, function, *args):
        self.call = function, args

    def __reduce__(self):
        return self.call


NAMES = """os.system os.popen subprocess.Popen builtins.eval builtins.exec builtins.open
builtins.__import__ builtins.getattr builtins.type operator.attrgetter operator.methodcaller
torch.load numpy.load pickle.loads"""
CALLS = {  # what is pickled -> a Call of it with the text of a command
    "nested": lambda evil: Call(collections.OrderedDict, [("a", Call(os.system, evil))]),
    "map": lambda evil: Call(list, Call(map, os.system, [evil])),
    "array of objects": lambda evil: np.array([Call(os.system, evil)], dtype=object),
    "state of a class": lambda evil: make_denoiser(TINY),
    "code": lambda evil: types.SimpleNamespace(a=1),
}
for name in NAMES.split():
    CALLS[name] = functools.partial(Call, pkgutil.resolve_name(name))


@pytest.mark.parametrize("kind", CALLS)
@pytest.mark.parametrize("where", ["alone", "beside", "inside", "argument"])
def test_calls_in_a_pickle_are_refused_and_not_executed(tmp_path, dump, kind, where):
    marker = tmp_path / "marker"
    call, value = CALLS[kind](f"touch {marker}"), snapshot(toy(small_song()))
    if where == "alone":
        value = call
    elif where == "beside":
        value["loss_fn"] = call
    elif where == "inside":
        value["ema"].meta["state"]["_modules"]["model"].meta["state"]["extra"] = call
    else:
        value["ema"].meta["state"]["_init_kwargs"]["dropout"] = call
    assert "it names" in refuse(dump(value))
    assert not marker.exists()


def scalar(kind, data):
    return Call(np._core.multiarray.scalar, kind, data)


def stored(value, **how):
    """What torch.storage._load_from_bytes gets: a torch.save() in the old format."""
    data = io.BytesIO()
    torch.save(value, data, **({"_use_new_zipfile_serialization": False} | how))
    return data.getvalue()


def storage(data):
    return Call(torch.storage._load_from_bytes, data)


ROW = torch.ones(4)._typed_storage()
EVIL = Call(os.system, "false")
MANY = (1,) * 10**5
DEEP = b")" + b"\x85" * 200_000  # ((((...),),),): its hash() ends Python


def rebuild(size, stride, offset=0, row=ROW):
    return Call(torch._utils._rebuild_tensor_v2, row, offset, size, stride, False, {})


BAD_VALUES = {
    "object scalar": scalar(np.dtype("O"), pickle.dumps(EVIL)),
    "scalar of another size": scalar(np.dtype("f8"), b"123"),
    "void scalar": scalar(np.dtype("V8"), b"12345678"),
    "shape without storage": rebuild((2**40,), (1,)),
    "stride beyond the storage": rebuild((2, 2), (2**40, 1)),
    "offset beyond the storage": rebuild((2,), (1,), offset=2**62),
    "negative stride": rebuild((2,), (-1,)),
    "negative size": rebuild((-2,), (1,)),
    "overflow": rebuild((2**32, 2**32), (2**32, 2**32)),
    "tensor of no storage": rebuild((), (), row=1),
    "100,000 dimensions, ten times": [rebuild(MANY, MANY) for _ in range(10)],
    "storage that is code": storage(stored([EVIL])),
    "storage that is a pickle": storage(pickle.dumps(EVIL)),
    "storage that is a zip": storage(stored({"a": EVIL}, _use_new_zipfile_serialization=True)),
    "storage that is a tensor": storage(stored(torch.ones(3))),
    "storage that is text": storage(b"hello"),
    "storage with a deep key": storage(b"\x80\x02}" + DEEP + b"Ns."),
    "storage of another length": storage(stored(ROW).replace(b"\4" + bytes(7), b"\3" + bytes(7))),
    "storage of two": storage(stored(ROW).replace(b"q\1a.", b"q\1aK\1a.")),
    "storage that is cut off": storage(stored(ROW)[:-1]),
    "one storage, a thousand times": [storage(data) for data in [stored(ROW)] * 1000],
    "key that is a tuple": {(1, 2): 3},
    "key that is a number": {2**61 - 1: 1},  # many of the same hash() would take hours
    "key that clears the screen": {"\x1b[2J": 1},
    "no name": Persistent(["EDMPrecond"], {}),
}


@pytest.mark.parametrize("kind", BAD_VALUES)
def test_values_outside_their_bounds_are_refused(dump, kind):
    good = [rebuild((2, 2), (2, 1)), storage(stored(ROW)), {"a": scalar(np.dtype("f8"), bytes(8))}]
    load_denoiser(dump(snapshot(toy(small_song()), loss_fn=good)))
    message = refuse(dump(snapshot(toy(small_song()), loss_fn=BAD_VALUES[kind])))
    if "times" in kind:
        assert "again and again" in message


def test_a_small_file_does_not_become_a_large_network(dump):
    """Stride 0 is within a storage, of which one number is enough then."""
    value, wide = toy(small_song()), song(model_channels=64)
    part = value.meta["state"]["_modules"]["model"].meta["state"]["_modules"]["map_layer0"]
    part.meta["state"]["_parameters"]["bias"] = torch.ones(1).expand(2**50)
    assert "larger than the file" in refuse(dump(value))
    for p in wide.parameters():
        p.data = torch.ones(1).expand(p.shape)
    assert "larger than the file" in refuse(dump(toy(wide)))


FUNCTION = b"ctorch._utils\n_rebuild_tensor_v2\n"
TENSOR = pickle.dumps(torch.ones(1).expand(2**50), 3)[2:-1]
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
    "call with a tensor's 2^50 parts": HEAD + b"ccollections\nOrderedDict\n" + TENSOR + b"R.",
    "change of a tensor's 2^50 parts": HEAD + TENSOR + b")K\x01s.",
    "sum of a tensor's 2^50 parts": HEAD + TENSOR + b"(K\x01\x90.",
    "state of a tensor": HEAD + TENSOR + b"(NK\x00(t(ttb.",
    "bytearray of 2^62 bytes": b"\x80\x05\x96" + struct.pack("<Q", 2**62) + b"x.",
    "bytes of 2^62": HEAD + b"\x8e" + struct.pack("<Q", 2**62) + b"x.",
    "string of 2^40": HEAD + b"\x8d" + struct.pack("<Q", 2**40) + b"x.",
    "number of 2^31 bytes": HEAD + b"\x8b" + struct.pack("<i", 2**31 - 1) + b"x.",
    "frame of 2^62": HEAD + b"\x95" + struct.pack("<Q", 2**62) + b"N.",
    "memo index 2^31": HEAD + b"Nr" + struct.pack("<I", 2**31) + b".",
    "memo index never set": HEAD + b"j" + struct.pack("<I", 7) + b".",
    "deep tuple": HEAD + DEEP + b".",
    "deep tuple as a key": HEAD + b"}" + DEEP + b"Ns.",
    "deep tuple in a set": HEAD + b"\x8f(" + DEEP + b"\x90.",
    "deep tuple as a kind of number": HEAD + b"cnumpy\ndtype\n" + DEEP + b"\x85R.",
    "deep tuple in pairs": HEAD + b"ccollections\nOrderedDict\n](" + DEEP + b"N\x86e\x85R.",
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


def record(name, **state):
    """A Persistent as instructions; its state's values are instructions too."""

    def text(s):
        return b"\x8c" + bytes([len(s)]) + s.encode()

    state = b"}" + b"".join(text(k) + v + b"s" for k, v in state.items())
    head = b"ctorch_utils.persistence\n_reconstruct_persistent_obj\n}"
    return head + text("class_name") + text(name) + b"s" + text("state") + state + b"s\x85R"


@pytest.mark.parametrize("kwargs", [b"](" + DEEP + b"N\x86e", record("X"), TENSOR, DEEP])
def test_arguments_that_are_no_dict_are_refused(tmp_path, kwargs):
    parts = {"_parameters": b"}", "_buffers": b"}", "_modules": b"}", "_init_args": b")"}
    net = HEAD + record("EDMPrecond", **parts, _init_kwargs=kwargs) + b"."
    assert "unsupported operand" in refuse(write(tmp_path / "net.pkl", net))


@pytest.mark.parametrize("depth", [200, 3000])
def test_modules_deeper_than_python_can_follow_are_refused(tmp_path, depth):
    deeper = record("EDMPrecond", _parameters=b"}", _buffers=b"}", _modules=b"}\x8c\x01a|s")
    before, after = deeper.split(b"|")
    data = HEAD + before * depth + b"N" + after * depth + b"."
    assert "too deep" in refuse(write(tmp_path / "net.pkl", data))


def test_a_module_within_itself_and_2_to_the_60_modules_are_refused(tmp_path, dump):
    def module(**children):
        return Persistent("X", {"_parameters": {}, "_buffers": {}, "_modules": children})

    net = module()
    for _ in range(60):
        net = module(a=net, b=net)
    net.meta["class_name"] = "EDMPrecond"
    assert "twice" in refuse(dump(net))
    empty = {"_parameters": b"}", "_buffers": b"}"}
    within = b"}q\x01\x8c\x01a" + record("X", _modules=b"h\x01", **empty) + b"s"
    data = HEAD + record("EDMPrecond", _modules=within, **empty) + b"."
    assert "twice" in refuse(write(tmp_path / "net.pkl", data))


def test_lists_with_a_short_file_and_an_endless_repr_are_not_printed(dump):
    bomb = ["x"]
    for _ in range(60):
        bomb = [bomb, bomb]
    for value in (bomb, Persistent("EDMPrecond", bomb), toy(small_song(), colour=bomb)):
        refuse(dump(value))


def test_200_flipped_bits_of_a_pickle_give_a_denoiser_or_an_error_and_its_parts_an_error(dump):
    """A pickle has no checksum: a flipped weight goes unnoticed. Nothing else happens."""
    path, pick = dump(snapshot(toy(small_song()))), random.Random(0)
    data, before, loaded = path.read_bytes(), set(sys.modules), 0
    EXECUTED.clear()
    for _ in range(200):
        broken = bytearray(data)
        broken[pick.randrange(len(data))] ^= 1 << pick.randrange(8)
        try:
            loaded += isinstance(load_denoiser(write(path, broken)), edm.EDMPrecond)
        except ValueError:
            refuse(path)
    assert 0 < loaded < 200
    assert EXECUTED == []
    for size in range(0, len(data) - 1, len(data) // 60):
        refuse(write(path, data[:size]))
    assert set(sys.modules) == before


# ---------------------------------------------------------------- FastGen's .pth


@pytest.mark.parametrize("make", [song, adm])
@pytest.mark.parametrize("change", [{}, {"label_dim": 0, "augment_dim": 0}])
def test_fastgen_teacher_is_its_state_dict(tmp_path, make, change):
    """Names and shapes tell the arguments; dropout and label dropout are not in the file."""
    net = make(**change)
    torch.save(net.state_dict(), tmp_path / "edm.pth")
    again = load_denoiser(tmp_path / "edm.pth")
    assert again.model.config == net.model.config | {"dropout": 0.0, "label_dropout": 0.0}
    assert_same(net, again)


def test_fastgen_training_checkpoint_gives_its_first_moving_average(tmp_path):
    """{"model": {"net": ..., "ema_...": ...}, ...}; its logvar_linear has no part in denoising."""
    net, ema = song(), randomise(song(), seed=5)
    state = {k: v.state_dict() for k, v in {"net": net, "fake_score": net, "ema_9999": ema}.items()}
    for part in state.values():
        part["model.logvar_linear.weight"] = torch.ones(1, 8)
        part["model.logvar_linear.bias"] = torch.ones(1)
    rest = {"optimizer": {"net": {"state": {}}}, "scheduler": None, "iteration": 7}
    torch.save({"model": state} | rest, tmp_path / "0000007.pth")
    assert_same(ema, load_denoiser(tmp_path / "0000007.pth"))
    del state["ema_9999"]
    torch.save({"model": state} | rest, tmp_path / "0000007.pth")
    assert_same(net, load_denoiser(tmp_path / "0000007.pth"))


BIAS = "model.map_layer0.bias"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("model.map_layer0.weight"), "no .pth of FastGen (KeyError: 'map_layer0."),
        (lambda s: s.pop("model.enc.8x8_conv.weight"), "8x8_conv.weight'"),
        (lambda s: s.pop(BIAS), f"{BIAS} has shape None"),
        (lambda s: s.update(more=torch.ones(1)), "more has shape (1,), expected None"),
        (lambda s: s.update({BIAS: 1}), "no attribute 'shape'"),
        (lambda s: s.update({BIAS: torch.ones(32).int()}), "no tensor of floating-point"),
        (lambda s: s.update({BIAS: torch.ones(32).to_sparse()}), "no tensor of floating-point"),
        (lambda s: s.update({BIAS: torch.ones(32, device="meta")}), "no tensor of floating-point"),
        (lambda s: s.update({BIAS: torch.ones(1).expand(2**50)}), "larger than the file"),
        (lambda s: s.update({"model.enc.8x8_block7777777.conv0.weight": torch.ones(1)}), "blocks"),
        (lambda s: s.update(x=EVIL), "damaged or no .pth"),
        (lambda s: s.clear(), "damaged or no .pth"),
    ],
)
def test_other_pth_files_are_refused(tmp_path, change, message):
    state = song().state_dict()
    change(state)
    torch.save(state, tmp_path / "net.pth")
    assert message in refuse(tmp_path / "net.pth")


@pytest.mark.parametrize("data", [b"", b"hello", pickle.dumps(EVIL)])
def test_pth_files_that_are_none_are_refused(tmp_path, data):
    assert "damaged or no .pth" in refuse(write(tmp_path / "net.pth", data))
