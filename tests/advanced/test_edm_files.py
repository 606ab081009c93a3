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


def adm(**changes):
    torch.manual_seed(0)
    return randomise(edm.EDMPrecond(DhariwalUNet(**(ADM | changes)))).eval()


SMALL = song(channel_mult=[1], num_blocks=0, label_dim=0, augment_dim=0)


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
def test_imagenet64_configuration_has_the_published_size_and_names():
    with torch.device("meta"):
        net = DhariwalUNet(64, 3, 1000)
        narrow = DhariwalUNet(8, 3, model_channels=32, channel_mult=[2, 4])
    shapes = {name: tuple(v.shape) for name, v in net.state_dict().items()}
    assert (sum(p.numel() for p in net.parameters()), len(shapes)) == (295_899_267, 553)
    some = {"enc.64x64_conv.weight": (192, 3, 3, 3), "dec.32x32_block2.proj.bias": (384,)}
    some |= {"enc.32x32_block1.affine.weight": (768, 768), "map_label.weight": (768, 1000)}
    some |= {"enc.32x32_block0.skip.weight": (384, 192, 1, 1)}
    some |= {"enc.32x32_down.skip.resample_filter": (1, 1, 2, 2)}
    assert shapes | some == shapes
    absent = ("map_label.bias", "enc.64x64_block0.qkv.weight", "enc.32x32_down.skip.weight")
    assert shapes.keys().isdisjoint(absent)
    # every block at 32, 16 and 8; DDPM++'s decoder has it in the last ones only
    assert sum(name.endswith("qkv.weight") for name in shapes) == 22
    # the first convolution has the width of its level, unlike DDPM++'s
    assert len(narrow.enc["8x8_conv"].weight) == 64


def norm(x, layer):
    """A group has four channels or more, there are at most 32; eps = 1e-5."""
    return F.group_norm(x, min(32, x.shape[1] // 4), layer.weight, layer.bias, 1e-5)


def conv(x, layer):
    return F.conv2d(x, layer.weight, layer.bias, padding=layer.weight.shape[-1] // 2)


RESAMPLE = {"none": lambda v: v, "down": lambda v: F.avg_pool2d(v, 2)}
RESAMPLE |= {"up": lambda v: v.repeat_interleave(2, 2).repeat_interleave(2, 3)}


@pytest.mark.parametrize("cout", [8, 16, 128])
@pytest.mark.parametrize("kind", RESAMPLE)
def test_adm_block_scales_and_shifts_and_adds_without_a_factor(kind, cout):
    """y = skip r x + conv1 silu(norm1(conv0 r silu norm0 x) (scale + 1) + shift), where r: nearest
    neighbour up, mean of 2 x 2 down, or nothing, and the skip has weights to another width.

    With a head per 64 channels y + proj(softmax(q k / 8) v), channel c of head h of q, k, v at
    3 (64 h + c) + {0, 1, 2}; below 64 there are none."""
    torch.manual_seed(0)
    r, options = RESAMPLE[kind], {kind: True} if kind != "none" else {}
    block = randomise(ADMBlock(8, cout, 16, 0.0, attention=True, **options)).double()
    x, emb = torch.randn(2, 8, 4, 4).double() * 1e-2, torch.randn(2, 16).double()  # eps matters
    h = conv(r(F.silu(norm(x, block.norm0))), block.conv0)
    scale, shift = (emb @ block.affine.weight.T + block.affine.bias)[:, :, None, None].chunk(2, 1)
    h = conv(F.silu(norm(h, block.norm1) * (scale + 1) + shift), block.conv1)
    assert ("skip.weight" in block.state_dict()) == (cout > 8)
    y = (r(x) if cout == 8 else conv(r(x), block.skip)) + h
    if cout == 128:
        q, k, v = conv(norm(y, block.norm2), block.qkv).reshape(2, 2, 64, 3, -1).unbind(3)
        attended = v @ (q.mT @ k / 8).softmax(3).mT
        y = y + conv(attended.reshape(y.shape), block.proj)
    assert_close(block(x, emb), y)


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
    """F = out_conv silu out_norm h: with a last block of known h, so small that eps matters."""
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
        assert all(0.9 * bound < p.abs().max() <= bound for p in layer.parameters())
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
    __module__ = "dnnlib.util"


def _reconstruct_persistent_obj(meta):
    raise AssertionError("was called")


_reconstruct_persistent_obj.__module__ = "torch_utils.persistence"


class Call:
    """Pickled as a call of function(*args)."""

    def __init__(self, function, *args):
        self.call = function, args

    def __reduce__(self):
        return self.call


scalar = functools.partial(Call, np._core.multiarray.scalar)
storage = functools.partial(Call, torch.storage._load_from_bytes)
rebuild = functools.partial(Call, torch._utils._rebuild_tensor_v2)


class Persistent(Call):
    """Pickled as NVlabs' persistent classes are: a name, a source text that is not run, a state."""

    def __init__(self, class_name, state):
        self.state, meta = state, {"type": "class", "version": 6, "module_src": "raise SystemExit"}
        super().__init__(_reconstruct_persistent_obj, meta)
        meta |= {"class_name": class_name, "state": state}


@pytest.fixture
def file(tmp_path):
    """file(value) -> its pickle, made with throw-away modules; or bytes as they are."""

    def file(value, suffix=".pkl", protocol=4):
        path = tmp_path / f"net{suffix}"
        with pytest.MonkeyPatch.context() as patch:
            for item in (EasyDict, _reconstruct_persistent_obj):
                found = types.SimpleNamespace(**{item.__name__: item})
                for name in (item.__module__, item.__module__.split(".")[0]):
                    patch.setitem(sys.modules, name, found)
            path.write_bytes(value if isinstance(value, bytes) else pickle.dumps(value, protocol))
        return path

    return file


def persistent(module, class_name=None, **state):
    """A module of ours as a genuine pickle has it, down to the leaves."""
    parts = {name: persistent(child) for name, child in module._modules.items() if child}
    if isinstance(module, torch.nn.ModuleDict):
        container = torch.nn.ModuleDict()
        container.__dict__["_modules"] = parts
        return container
    ordered = {"parameters": module._parameters, "buffers": module._buffers, "modules": parts}
    state |= {f"_{k}": collections.OrderedDict(v) for k, v in ordered.items()}
    state |= {"_non_persistent_buffers_set": set(), "_backward_hooks": collections.OrderedDict()}
    state |= {"training": False, "skip_scale": np.sqrt(0.5), "eps": np.float32(1e-6)}
    return Persistent(class_name or type(module).__name__, state)


def toy(denoiser, class_name="EDMPrecond", **changes):
    """A network as NVlabs pickles it, with the keyword arguments that its training gave."""
    kwargs = {k: v for k, v in denoiser.model.config.items() if k != "patch_size"}
    kwargs |= {"model_type": type(denoiser.model).__name__, "use_fp16": True}
    kwargs |= {} if isinstance(denoiser.model, DhariwalUNet) else edm_files.DDPMPP
    net = persistent(denoiser, class_name, _init_args=(), _init_kwargs=EasyDict(kwargs | changes))
    net.state["_buffers"]["cache"] = torch.ones(1)  # not in a state dict
    net.state["_non_persistent_buffers_set"] = {"cache"}
    parts = net.state["_modules"]["model"].state["_modules"]
    parts["map_noise"] = Persistent("PositionalEmbedding", persistent(torch.nn.Identity()).state)
    return net


def snapshot(network, **more):
    loss = Persistent("EDMLoss", {"P_mean": -1.2, "P_std": 1.2, "sigma_data": 0.5})
    data = EasyDict(path="cifar10-32x32.zip", xflip=False, max_size=50000)
    return {"ema": network, "loss_fn": loss, "augment_pipe": None, "dataset_kwargs": data} | more


@pytest.mark.parametrize("make", [song, adm])
@pytest.mark.parametrize("wrap", [snapshot, lambda net: {"model": net}, lambda net: net])
def test_a_pickle_is_read_bit_identically_and_so_is_what_is_saved_of_it(tmp_path, file, make, wrap):
    """Older .safetensors files do not tell the type; they are DDPM++."""
    net, path = make(), tmp_path / "again.safetensors"
    again = load_denoiser(file(wrap(toy(net))))
    assert_same(net, again)
    assert not again.training
    edm.save_denoiser(again, path)
    assert_same(net, load_denoiser(path))
    if make is song:
        edm.save_tensors(path, net.state_dict(), {"network": net.model.config, "sigma_data": 0.5})
        assert_same(net, load_denoiser(path))


def test_positional_arguments_half_precision_and_numbers_of_numpy_are_read(file):
    """EDMPrecond(8, 1, ...), weights in float16 become float32, numbers of big-endian machines."""
    net = song(label_dim=0, label_dropout=0.5)
    numbers = {"num_blocks": np.int64(1), "model_channels": np.int32(8), "use_fp16": np.bool_(True)}
    numbers |= {"dropout": scalar(np.dtype(">f8"), struct.pack(">d", 0.1))}
    value = toy(net.half(), label_dropout=np.float32(0.5), sigma_data=np.float64(0.5), **numbers)
    for name in ("img_resolution", "img_channels"):
        value.state["_init_args"] += (value.state["_init_kwargs"].pop(name),)
    again = load_denoiser(file(value, protocol=5))
    assert next(again.parameters()).dtype == torch.float32
    assert again.model.config == net.model.config
    assert_same(net.float(), again)


# ---------------------------------------------------------------- hostile pickles
EXECUTED = []  # what Python itself reports: an audit hook cannot be removed, nor deceived


@sys.addaudithook
def watch(event, arguments):
    if event in ("os.system", "subprocess.Popen", "os.posix_spawn", "os.exec", "pickle.find_class"):
        EXECUTED.append((event, arguments))


def test_the_watch_sees_what_pickle_would_execute():
    EXECUTED.clear()
    pickle.loads(pickle.dumps(Call(os.system, "true")))
    assert {event for event, _ in EXECUTED} == {"os.system", "pickle.find_class"}


@pytest.fixture
def refuse(file):
    """refuse(value) -> the error of its file, one short line; nothing is executed."""

    def refuse(value, suffix=".pkl"):
        path = file(value, suffix)
        EXECUTED.clear()
        with pytest.raises(ValueError, match=r"^.+$") as error:
            load_denoiser(path)
        assert len(str(error.value)) < 500
        assert EXECUTED == []
        return str(error.value)

    return refuse


def each(table):
    """{message: [values]} -> a test of each value."""
    pairs = [(message, value) for message, values in table.items() for value in values]
    return pytest.mark.parametrize(("message", "value"), pairs, ids=[m for m, _ in pairs])


FOURIER = {"embedding_type": "fourier", "encoder_type": "residual"}
REFUSED = {
    "another embedding_type": [FOURIER, {"embedding_type": ["x" * 10**5] * 10**4}],
    "another resample_filter": [{"resample_filter": [1, 3, 3, 1]}],
    "embedding_type is no number": [{"model_type": "DhariwalUNet"}],  # ADM has no such thing
    "DiT": [{"model_type": "DiT"} | dict.fromkeys(edm_files.DDPMPP, 1)],
    "model_type is no name": [{"model_type": ["SongUNet"]}],
    "colour": [{"colour": 1}],
    "noise levels are from 0 to 10.0": [{"sigma_max": 10.0}],
    "is no number": [{"sigma_min": torch.ones(9)}, {"dropout": [[1.0]]}],
    "model_channels is no number": [{"model_channels": "8", "channel_mult_emb": 2**40}],
    "channel_mult is no number or short list": [{"channel_mult": [0] * 10**5}],
    "has shape": [{"num_blocks": 2}, {"model_channels": 2**20}, {"channel_mult": []}],
    "more blocks than tensors": [{"num_blocks": 10**9}],
    "does not describe": [{"img_resolution": 8.5}],
    "a key that is no name": [{"x" * 101: 1}],
}
for name in ("VPPrecond", "VEPrecond", "iDDPMPrecond", "Precond"):
    REFUSED[f"{name!r}, and only EDMPrecond is"] = [{"class_name": name}]


@each(REFUSED)
def test_arguments_that_are_not_implemented_are_refused(refuse, message, value):
    assert message in refuse(snapshot(toy(song(), **value)))


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
CALLS |= {k: functools.partial(Call, pkgutil.resolve_name(k)) for k in NAMES.split()}


@pytest.mark.parametrize("kind", CALLS)
def test_calls_in_a_pickle_are_refused_and_not_executed(tmp_path, refuse, kind):
    """Alone, beside a network, inside it, among its arguments."""
    marker, inside = tmp_path / "marker", toy(SMALL)
    inside.state["_modules"]["model"].state["extra"] = call = CALLS[kind](f"touch {marker}")
    for value in (call, snapshot(toy(SMALL), loss_fn=call), inside, toy(SMALL, dropout=call)):
        assert "it names" in refuse(value)
    assert not marker.exists()


def stored(value, new=False):
    """What torch.save() writes; torch.storage._load_from_bytes gets its old format."""
    data = io.BytesIO()
    torch.save(value, data, _use_new_zipfile_serialization=new)
    return data.getvalue()


ROW, EVIL = torch.ones(4)._typed_storage(), Call(os.system, "false")
STORED, MANY, BIG = stored(ROW), (1,) * 10**5, (2**32, 2**32)
DEEP = b")" + b"\x85" * 200_000  # ((((...),),),): its hash() ends Python
STORAGES = {
    "it names": [stored([EVIL]), pickle.dumps(EVIL), stored(torch.ones(3))],
    "a key that is no name": [b"\x80\2}" + DEEP + b"Ns."],
    "": [stored({"a": EVIL}, new=True), b"hello", STORED[:-1]],
}
CHANGES = [(b"\4" + bytes(7), b"\3" + bytes(7)), (b"q\1a.", b"q\1aK\1a.")]  # length, keys
STORAGES["that torch.save did not write"] = [STORED.replace(*change) for change in CHANGES]
VALUES = {message: [storage(data) for data in items] for message, items in STORAGES.items()}
# a tuple, a number (many of the same hash() would take hours), one that clears the screen
VALUES["a key that is no name"] += [{(1, 2): 3}, {2**61 - 1: 1}, {"\x1b[2J": 1}]
VALUES["a class without a name"] = [Persistent(["EDMPrecond"], {})]
AGAIN = [rebuild(ROW, 0, MANY, MANY) for _ in range(10)], [storage(STORED) for _ in range(1000)]
VALUES["again and again"] = AGAIN
SCALARS = [("O", pickle.dumps(EVIL)), ("f8", b"123"), ("V8", bytes(8))]
VALUES[""] += [scalar(np.dtype(kind), data) for kind, data in SCALARS]
OUTSIDE = [(0, (2**40,), (1,)), (0, (2, 2), (2**40, 1)), (2**62, (2,), (1,)), (0, (2,), (-1,))]
OUTSIDE += [(0, (-2,), (1,)), (0, BIG, BIG)]  # offset, size, stride
VALUES[""] += [*(rebuild(ROW, *how) for how in OUTSIDE), rebuild(1, 0, (), ())]


@each(VALUES)
def test_values_outside_their_bounds_are_refused(refuse, message, value):
    assert message in refuse(snapshot(toy(SMALL), loss_fn=value))


def module(modules=b"}", more=b""):
    """EDMPrecond as instructions; its modules are instructions, too."""
    head = b"ctorch_utils.persistence\n_reconstruct_persistent_obj\n}\x8c\x0aclass_name"
    head += b"\x8c\x0aEDMPrecond" + b"s\x8c\5state}\x8c\x0b_parameters}s\x8c\x08_buffers}s"
    return head + b"\x8c\x08_modules" + modules + b"s" + more + b"s\x85R"


SYSTEM, FUNCTION = b"cos\nsystem\n", b"ctorch._utils\n_rebuild_tensor_v2\n"
DICT, PAIRS = b"ccollections\nOrderedDict\n", b"](" + DEEP + b"N\x86e"
BEFORE, AFTER = module(b"}\x8c\1a|s").split(b"|")
WIDE = pickle.dumps(torch.ones(1).expand(2**50), 3)[2:-1]
SIZE = b"\xff\xff\xff\x7f\0\0\0\x40"  # in four bytes 2^31 - 1, in eight more than 2^62
SIZED = ["LONG4", "LONG_BINPUT", "LONG_BINGET", "BYTEARRAY8", "BINBYTES8", "BINUNICODE8", "FRAME"]
INSTRUCTIONS = {
    "it names 'os.system'": [SYSTEM + b"(S'false'\ntR", b"(" + SYSTEM + b"U\5falseo"],
    "it names 'posix.system'": [b"\x8c\5posix\x8c\6system\x93\x8c\5false\x85R"],
    "it names 'collections": [b"\x8c\x0bcollections\x8c\x16OrderedDict.fromkeys.x\x93"],
    "it names 'torch": [FUNCTION[:-1] + b".__globals__\n"],
    "it changes a": [FUNCTION + b"}b", FUNCTION + b"N}\x8c\x0c__defaults__)s\x86b", b"}}b"],
    "a key that is no name": [b"}" + DEEP + b"Ns", b"\x8f(" + DEEP + b"\x90"],
    "a class without a name": [b"cnumpy\ndtype\n" + DEEP + b"\x85R"],
    "too deep": [BEFORE * n + b"N" + AFTER * n for n in (200, 3000)],
    "twice": [module(b"}q\1\x8c\1a" + module(b"h\1") + b"s")],  # within itself
    "": [DEEP, DICT + PAIRS + b"\x85R", b"PK\3\4" + bytes(100), b"hello", b"", b"e"],
}
ARGUMENTS = [b"\x8c\x0a_init_args)s\x8c\x0c_init_kwargs" + v for v in (PAIRS, module(), WIDE, DEEP)]
INSTRUCTIONS["unsupported operand"] = [module(more=given + b"s") for given in ARGUMENTS]
# instructions that no file needs, and names that are numbers; calls of a string and of a module
NOT_KNOWN = [pickle.EXT1 + b"\1", pickle.EXT2 + b"\1\0", pickle.EXT4 + b"\1\0\0\0", b"Pabc\n"]
NOT_KNOWN += [b"K\1Q", b"(S'false'\nios\nsystem\n", FUNCTION + b")}\x92", b"K\1K\2\x93"]
CALLED = [b"\x8c\4evil)R", b"ctorch.nn.modules.container\nModuleDict\n)\x81)R"]
PARTS = [DICT + WIDE + b"R", WIDE + b")K\1s", WIDE + b"(K\1\x90", WIDE + b"(NK\0(t(ttb"]  # 2^50
INSTRUCTIONS[""] += NOT_KNOWN + CALLED + PARTS
INSTRUCTIONS[""] += [b"N" + getattr(pickle, name) + SIZE for name in SIZED]


@each(INSTRUCTIONS)
def test_hostile_instructions_are_refused(refuse, message, value):
    assert message in refuse(value + b".")


def test_networks_of_another_filter_or_larger_than_the_file_are_refused(refuse):
    """Stride 0 is within a storage, of which one number is enough then."""
    filtered, value, wide = song(), toy(SMALL), song(model_channels=64)
    filtered.model.enc["4x4_down"].conv0.resample_filter[..., 0, :] = 0.5
    assert "resample_filter is not the mean" in refuse(toy(filtered))
    part = value.state["_modules"]["model"].state["_modules"]["map_layer0"]
    part.state["_parameters"]["bias"] = torch.ones(1).expand(2**50)
    for p in wide.parameters():
        p.data = torch.ones(1).expand(p.shape)
    assert all("larger than the file" in refuse(v) for v in (value, toy(wide)))


def test_2_to_the_60_parts_of_a_short_file_are_neither_visited_nor_printed(refuse):
    bomb, net = ["x"], None
    for _ in range(60):
        state = {"_parameters": {}, "_buffers": {}, "_modules": {"a": net, "b": net}}
        bomb, net = [bomb, bomb], Persistent("EDMPrecond", state)
    assert "twice" in refuse(net)
    for value in (bomb, Persistent("EDMPrecond", bomb), toy(SMALL, colour=bomb)):
        refuse(value)


def test_flipped_bits_give_a_denoiser_or_an_error_and_parts_of_a_file_an_error(file, refuse):
    """A pickle has no checksum: a flipped weight goes unnoticed. Nothing else happens."""
    data, before = file(snapshot(toy(SMALL))).read_bytes(), set(sys.modules)
    for size in range(0, len(data) - 1, len(data) // 30):
        refuse(data[:size])
    flip, errors = random.Random(0).randrange, 0
    for _ in range(100):
        broken = bytearray(data)
        broken[flip(len(data))] ^= 1 << flip(8)
        try:
            load_denoiser(file(bytes(broken)))
        except ValueError:
            errors += 1
    assert 0 < errors < 100
    assert EXECUTED == []
    assert set(sys.modules) == before


# ---------------------------------------------------------------- FastGen's .pth
@pytest.mark.parametrize("make", [song, adm])
@pytest.mark.parametrize("change", [{}, {"label_dim": 0, "augment_dim": 0}])
def test_fastgen_teacher_is_its_state_dict(file, make, change):
    """Names and shapes tell the arguments; dropout and label dropout are not in the file."""
    net = make(**change)
    again = load_denoiser(file(stored(net.state_dict(), new=True), ".pth"))
    assert again.model.config == net.model.config | {"dropout": 0.0, "label_dropout": 0.0}
    assert_same(net, again)


def test_fastgen_training_checkpoint_gives_its_first_moving_average(file):
    """{"model": {"net": ..., "ema_...": ...}, ...} beside what its trainer needs, with numbers of
    numpy. logvar_linear and f-distill's bins have no part in denoising, prefixes of compiled and
    distributed networks none in a name."""
    networks = {"net": song(), "fake_score": song(), "ema_9999": randomise(song(), seed=5)}
    logvar = {"weight": torch.ones(1, 8), "bias": torch.ones(1)}
    logvar = {f"model.logvar_linear.{k}": v for k, v in logvar.items()} | {"bins": torch.ones(10)}
    value = {"iteration": 7, "model": {k: v.state_dict() | logvar for k, v in networks.items()}}
    adam = {"step": torch.tensor(7.0), "exp_avg": torch.ones(3), "exp_avg_sq": torch.ones(3)}
    group = {"lr": np.float64(1e-4), "initial_lr": 1e-4, "betas": (0.9, 0.999), "params": [0]}
    rates = {"base_lrs": [1e-4], "last_epoch": 7, "_last_lr": [np.float64(1e-4)]}
    value |= {"optimizer": {"net": {"state": {0: adam}, "param_groups": [group]}}}
    value |= {"scheduler": {"net": rates | {"lr_lambdas": [None]}}, "grad_scaler": {}}
    for name in ("ema_9999", "net"):
        for prefix in ("", "_orig_mod.", "module.", "module._orig_mod."):
            renamed = {prefix + k: v for k, v in networks[name].state_dict().items()}
            value["model"][name] = renamed | {prefix + k: v for k, v in logvar.items()}
            old = stored(value)
            for data in (stored(value, new=True), old, old.replace(b"numpy._core", b"numpy.core")):
                EXECUTED.clear()
                assert_same(networks[name], load_denoiser(file(data, ".pth")))
                assert EXECUTED == []
        del value["model"][name]


BIAS, ONE = "model.map_layer0.bias", torch.ones(1)
BAD = (torch.ones(32).int(), torch.ones(32).to_sparse(), torch.ones(32, device="meta"))
SCRIPT = io.BytesIO()
torch.jit.save(torch.jit.script(torch.nn.Linear(1, 1)), SCRIPT)
CUT = [stored(value, new=True)[:-99] for value in ({}, SMALL.state_dict())]
CUT += [stored(value, new=True) for value in ({}, ["model"], {"model": 1}, {"model": {"net": 1}})]
PTH = {  # changes of a state dict, where None is no tensor; or whole files
    "(KeyError: 'map_layer0.weight'": [{"model.map_layer0.weight": None}],
    "8x8_conv.weight'": [{"model.enc.8x8_conv.weight": None}],
    "has shape": [{BIAS: None}, {"more": ONE}],
    "no tensor of floating-point": [{BIAS: value} for value in BAD],
    "larger than the file": [{BIAS: ONE.expand(2**50)}],
    f"{BIAS} has NaN or infinite": [{BIAS: ONE.repeat(32) * v} for v in (torch.nan, -torch.inf)],
    "blocks": [{"model.enc.8x8_block7777777.conv0.weight": ONE}],
    "(it names 'posix.system', which no": [{"x": EVIL}],
    "(it names 'numpy": [{"x": np.ones(1)}, stored(scalar(np.dtype("O"), np.ones(1)), new=True)],
    "TorchScript": [SCRIPT.getvalue()],
    "no .pth": [{BIAS: v} for v in (1, np.float64(1), np.dtype("f8"))],
}
PTH["no .pth"] += [*CUT, b"", b"hello", pickle.dumps(EVIL), stored(scalar(np.dtype("O"), "x"))]


@each(PTH)
def test_other_pth_files_are_refused(refuse, message, value):
    if isinstance(value, dict):
        state = {k: v for k, v in (song().state_dict() | value).items() if v is not None}
        value = stored(state, new=True)
    assert message in refuse(value, ".pth")
