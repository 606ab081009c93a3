"""Files of others: NVlabs/edm's pickles and FastGen's .pth; ADM, the network of ImageNet-64."""

import io
import math
import pickle
import re
import struct
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import edm_teacher as edm
from edm_teacher import Conv2d, EDMPrecond, Linear, SongUNet, UserError, brief, group_norm

# == 1. ADM =========================================================================== EDM Table 1


class ADMBlock(edm.UNetBlock):
    """ADM's block: the embedding scales and shifts, a head per 64 channels, sums as they are."""

    def __init__(self, cin, cout, emb_channels, dropout, up=False, down=False, attention=False):
        nn.Module.__init__(self)
        self.heads = cout // 64  # 0 in a narrow ADM: as in EDM, no attention then
        self.attention = attention and self.heads > 0
        self.norm0, self.conv0 = group_norm(cin, 1e-5), Conv2d(cin, cout, 3, up, down)
        self.affine, self.norm1 = Linear(emb_channels, 2 * cout), group_norm(cout, 1e-5)
        self.dropout, self.conv1 = nn.Dropout(dropout), Conv2d(cout, cout, 3, scale=1e-5)
        kernel = 0 if cin == cout else 1  # resampled without a convolution where the width stays
        self.skip = Conv2d(cin, cout, kernel, up, down) if cin != cout or up or down else None
        if self.attention:
            self.norm2 = group_norm(cout, 1e-5)
            self.qkv = Conv2d(cout, cout * 3, 1, scale=math.sqrt(0.2))
            self.proj = Conv2d(cout, cout, 1, scale=1e-5)

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        h = self.conv0(F.silu(self.norm0(x)))
        scale, shift = self.affine(emb)[:, :, None, None].chunk(2, 1)
        h = self.conv1(self.dropout(F.silu(self.norm1(h) * (scale + 1) + shift)))
        x = (x if self.skip is None else self.skip(x)) + h
        return self.attend(x, self.heads) + x if self.attention else x


class DhariwalUNet(SongUNet):
    """EDM's ADM network (ImageNet-64): names and numerics of the published checkpoints.

    Beside the blocks, ADM differs from DDPM++ in the embedding: cos before sin, lower frequencies,
    labels added behind both layers."""

    Block, attends_in_all = ADMBlock, True

    def __init__(
        self,
        img_resolution: int,
        img_channels: int,
        label_dim: int = 0,
        augment_dim: int = 0,
        model_channels: int = 192,
        channel_mult=(1, 2, 3, 4),
        channel_mult_emb: int = 4,
        num_blocks: int = 3,
        attn_resolutions=(32, 16, 8),
        dropout: float = 0.10,
        label_dropout: float = 0.0,
    ):
        nn.Module.__init__(self)
        self.describe({k: v for k, v in locals().items() if k not in ("self", "__class__")})
        c_emb = model_channels * channel_mult_emb
        self.map_augment = Linear(augment_dim, model_channels, bias=False) if augment_dim else None
        self.map_layer0, self.map_layer1 = Linear(model_channels, c_emb), Linear(c_emb, c_emb)
        self.map_label = Linear(label_dim, c_emb, bias=False) if label_dim else None
        cout = self.build(img_channels, model_channels * channel_mult[0], c_emb)
        self.out_norm, self.out_conv = group_norm(cout, 1e-5), Conv2d(cout, img_channels, 3)
        # uniform within 1 / √fan_in, biases too; last layers 0; weights of labels N(0, 1)
        for name, module in self.named_modules():
            if isinstance(module, (Linear, Conv2d)) and module.weight is not None:
                zero = name.endswith(("conv1", "proj", "out_conv", "map_augment"))
                edge = 0.0 if zero else 1 / math.sqrt(module.weight[0].numel())
                for p in module.parameters():
                    nn.init.normal_(p) if name == "map_label" else nn.init.uniform_(p, -edge, edge)
        self.to(memory_format=torch.channels_last)

    def last(self, x: Tensor) -> Tensor:
        return self.out_conv(F.silu(self.out_norm(x)))

    def embed(self, noise_labels: Tensor, class_labels: Tensor | None, augment_labels) -> Tensor:
        emb = torch.cat(self.positional(noise_labels, self.model_channels // 2)[::-1], 1)
        if self.map_augment is not None and augment_labels is not None:
            emb = emb + self.map_augment(augment_labels)
        emb = self.map_layer1(F.silu(self.map_layer0(emb)))
        if self.map_label is not None and class_labels is not None:
            emb = emb + self.map_label(self.drop_labels(class_labels))
        return F.silu(emb)


# == 2. Files =====================================================================================


def load_denoiser(path, device="cpu") -> EDMPrecond:
    """The denoiser in a file, in float32, in eval mode. The end of the name says what the file is:

    .safetensors: ours;  .pkl: NVlabs/edm, EDMPrecond with DDPM++ or ADM;  .pth: FastGen.
    Raises FileNotFoundError, or ValueError: none of these, damaged, other names or shapes."""
    path, networks = Path(path), {"SongUNet": SongUNet, "DhariwalUNet": DhariwalUNet}
    if path.suffix not in (".pkl", ".pth"):
        return edm.build_denoiser(path, *edm.load_tensors(path), networks, device)
    left = path.stat().st_size
    try:
        state, config = load_nvlabs(path) if path.suffix == ".pkl" else load_fastgen(path)
        for name, t in state.items():
            plain = isinstance(t, Tensor) and t.layout == torch.strided and t.is_cpu
            if not plain or not t.is_floating_point():
                raise UserError(f"{name} is no tensor of floating-point numbers")
            if name.endswith("resample_filter") and t.numel() == 4 and not (t == 0.25).all():
                raise UserError(f"{name} is not the mean of 2 x 2, the one implemented here")
            left -= math.prod(t.shape) * t.element_size()
        if left < 0:  # a number, or a whole tensor, is used again and again
            raise UserError("its tensors are larger than the file")
        finite(state)
    except Exception as error:
        kind = "pickle of EDM" if path.suffix == ".pkl" else ".pth of FastGen"
        raise UserError(f"{path} is damaged or no {kind} ({brief(error)}).") from None
    return edm.build_denoiser(path, state, config, networks, device)


class Ignored:
    """In place of the optimizer's numbers of numpy: takes everything, keeps and calls nothing."""

    __init__ = __setstate__ = lambda self, *_: None


NUMPY = ["numpy.dtype", *(f"numpy.{core}.multiarray.scalar" for core in ("core", "_core"))]


def plain(name: str) -> str:
    """The name of a weight without what torch.compile and DDP put before it."""
    return re.sub(r"\b(_orig_mod|module)\.", "", name)


def finite(state: dict[str, Tensor]) -> None:
    for name, tensor in state.items():
        if not tensor.isfinite().all():
            raise UserError(f"{name} has NaN or infinite numbers: fetch the file again")


def load_fastgen(path: Path) -> tuple[dict[str, Tensor], dict]:
    """(tensors, config) of a .pth of FastGen: a converted teacher or a training checkpoint.

    The first is the state dict of EDMPrecond, the second has {"model": {"net": state dict, ...}};
    its first average ("ema...") is taken if there is one. Names and shapes tell the arguments; what
    they cannot tell: sigma_data is taken as 0.5, dropout as 0."""
    try:
        with torch.serialization.safe_globals([(Ignored, name) for name in NUMPY]):
            state = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:  # it advises to read the file all the same
        name = (re.search(r"GLOBAL (\S+)", f"{error}") or ("", "other things"))[1]
        raise UserError(f"it names {name[:80]!r}, which no network needs") from None
    if "model" in state:
        nets = state["model"]
        state = nets[next((name for name in nets if name.startswith("ema")), "net")]
    state = {plain(k): v for k, v in state.items()}
    extra = ("model.logvar_linear.weight", "model.logvar_linear.bias", "bins")  # bins: f-distill's
    state = {k: v for k, v in state.items() if k not in extra}
    shapes = {name.removeprefix("model."): tuple(t.shape) for name, t in state.items()}
    c_emb, channels = shapes["map_layer0.weight"]
    blocks = [re.match(r"enc\.(\d+)x\1_block(\d+)\.conv0\.weight$", name) for name in shapes]
    blocks = [(int(m[1]), int(m[2])) for m in blocks if m]
    levels = sorted({res for res, _ in blocks}, reverse=True)
    widths = [shapes[f"enc.{r}x{r}_block0.conv0.weight"][0] for r in levels]
    network = {"img_resolution": levels[0], "model_channels": channels, "dropout": 0.0}
    network["img_channels"] = shapes[f"enc.{levels[0]}x{levels[0]}_conv.weight"][1]
    for name in ("label", "augment"):
        network[f"{name}_dim"] = shapes.get(f"map_{name}.weight", (0, 0))[1]
    network["channel_mult"] = [width // channels for width in widths]
    network |= {"channel_mult_emb": c_emb // channels, "num_blocks": 1 + max(i for _, i in blocks)}
    network["attn_resolutions"] = [r for r in levels if f"enc.{r}x{r}_block0.qkv.weight" in shapes]
    model_type = "DhariwalUNet" if "out_conv.weight" in shapes else "SongUNet"
    return state, {"model_type": model_type, "network": network, "sigma_data": 0.5}


# --- NVlabs/edm ---
class Record:
    """An object or tensor of a pickle: its class and its data, which no instruction reaches."""

    def __init__(self, name: str, state=None):
        if not isinstance(name, str):
            raise UserError("it has a class without a name")
        self.name, self.state = name, state


class Names(dict):
    """Every kind of dict and set. A key is a short name: the hash() of a deep tuple ends Python."""

    def __setitem__(self, key, value):
        if not isinstance(key, str) or len(key) > 100 or not key.isprintable():
            raise UserError("it has a key that is no name")
        super().__setitem__(key, value)

    def add(self, key):
        self[key] = None


class Reader(pickle._Unpickler):
    """Python's unpickler with few instructions. Nothing is imported; what is called, is in `known`.

    The one written in Python: its memo is a dict, so that a large index costs no memory."""

    def __init__(self, file: io.BytesIO, known: dict, left: int = 0):
        super().__init__(file)
        self.known, self.left = known, left

    def find_class(self, module, name):
        if f"{module}.{name}" not in self.known:
            raise UserError(f"it names {f'{module}.{name}'[:80]!r}, which no network needs")
        return self.known[f"{module}.{name}"]

    def call(self):
        args = self.stack.pop()
        self.left -= sum(len(v) for v in (args, *args) if hasattr(v, "__len__"))
        if self.left < 0:  # a few bytes are enough to repeat a call, with as much data
            raise UserError("its parts are used again and again")
        self.append(self.stack.pop()(*args))

    def build(self):
        state = self.stack.pop()
        if not isinstance(self.stack[-1], Record):  # a function least of all
            raise UserError(f"it changes a {type(self.stack[-1]).__name__}")
        self.stack[-1].state = state


ALLOWED = """PROTO FRAME MARK STOP MEMOIZE BINPUT LONG_BINPUT BINGET LONG_BINGET NONE NEWTRUE
NEWFALSE BININT BININT1 BININT2 LONG1 BINFLOAT BINUNICODE SHORT_BINUNICODE BINUNICODE8 BINBYTES
SHORT_BINBYTES BINBYTES8 EMPTY_TUPLE TUPLE TUPLE1 TUPLE2 TUPLE3 EMPTY_LIST APPEND APPENDS
SETITEM SETITEMS ADDITEMS GLOBAL STACK_GLOBAL BINPERSID"""
ALLOWED = [getattr(pickle, name)[0] for name in ALLOWED.split()]
Reader.dispatch = {code: pickle._Unpickler.dispatch[code] for code in ALLOWED}
Reader.dispatch |= dict.fromkeys(pickle.REDUCE + pickle.NEWOBJ, Reader.call)
Reader.dispatch |= dict.fromkeys(pickle.EMPTY_DICT + pickle.EMPTY_SET, lambda r: r.append(Names()))
Reader.dispatch |= dict.fromkeys(pickle.BUILD, Reader.build)


def number(dtype: Record, data: bytes) -> float:
    """numpy.core.multiarray.scalar, of these kinds of number only."""
    code = {"f8": "d", "f4": "f", "i8": "q", "i4": "i", "b1": "?"}[dtype.name]
    return struct.unpack((">" if dtype.state[1] == ">" else "<") + code, data)[0]


def storage(data: bytes) -> Record:
    """torch.storage._load_from_bytes of what torch.save wrote: 5 pickles, then n, then n numbers.

    torch.load would do, but there a deep tuple as a key ends Python, with weights_only too."""
    file = io.BytesIO(data)
    readers = [Reader(file, DTYPES) for _ in range(5)]
    readers[3].persistent_load = lambda described: described
    _, _, _, (kind, dtype, key, _, n, view), keys = [reader.load() for reader in readers]
    numbers = bytearray(file.read())
    if (kind, view, keys, numbers[:8]) != ("storage", None, [key], n.to_bytes(8, "little")):
        raise UserError("it has numbers that torch.save did not write")
    return Record("storage", torch.frombuffer(numbers, dtype=torch.uint8)[8:].clone().view(dtype))


DTYPES = ("Double", "Float", "Half", "BFloat16", "Long", "Int", "Bool")
DTYPES = {f"torch.{name}Storage": getattr(torch, name.lower()) for name in DTYPES}
# every name that a genuine file needs, and what is called in its place; as_strided checks bounds
KNOWN = {
    "collections.OrderedDict": lambda: Names(),
    "dnnlib.util.EasyDict": lambda: Names(),
    "numpy.dtype": lambda code, *_: Record(code),
    "numpy.core.multiarray.scalar": number,
    "numpy._core.multiarray.scalar": number,
    "torch.nn.modules.container.ModuleDict": lambda: Record("ModuleDict"),
    "torch._utils._rebuild_parameter": lambda tensor, *_: tensor,
    "torch._utils._rebuild_tensor_v2": lambda row, offset, size, stride, *_: Record(
        "tensor", row.state.as_strided(size, stride, offset)
    ),
    "torch.storage._load_from_bytes": storage,
    "torch_utils.persistence._reconstruct_persistent_obj": lambda meta: Record(
        meta["class_name"],
        meta["state"],  # and not meta["module_src"], a program
    ),
}


def module_tensors(module: Record, prefix: str, seen: set):
    """Yields the items of nn.Module.state_dict, in its order."""
    parts = [module.state[name] for name in ("_parameters", "_buffers", "_modules")]
    if len(prefix) > 200 or not seen.isdisjoint(map(id, parts)):
        # two ways to one module, n times in a row, would be 2^n modules
        raise UserError(f"module {prefix[:80]!r} is there twice, or too deep")
    seen.update(map(id, parts))
    hidden = module.state.get("_non_persistent_buffers_set", ())
    for name, value in [*parts[0].items(), *parts[1].items()]:
        if value is not None and name not in hidden:
            yield prefix + name, value.state
    for name, child in parts[2].items():
        if child is not None:
            yield from module_tensors(child, f"{prefix}{name}.", seen)


# What genuine DDPM++ files say beside SongUNet's arguments; NCSN++ has other values.
DDPMPP = {"embedding_type": "positional", "channel_mult_noise": 1, "encoder_type": "standard"}
DDPMPP |= {"decoder_type": "standard", "resample_filter": [1, 1]}


def load_nvlabs(path: Path) -> tuple[dict[str, Tensor], dict]:
    """(tensors, config) of a pickle of NVlabs/edm: a dict with the network as "ema", or only it."""
    data = path.read_bytes()
    root = Reader(io.BytesIO(data), KNOWN, len(data)).load()
    if isinstance(root, Names):
        root = root.get("ema", root.get("model"))
    if root.name != "EDMPrecond":
        raise UserError(f"it holds {root.name[:80]!r}, and only EDMPrecond is implemented")
    tensors = dict(module_tensors(root, "", set()))
    names = ("img_resolution", "img_channels", "label_dim", "use_fp16", "sigma_min", "sigma_max")
    names += ("sigma_data", "model_type")
    given = dict(zip(names, root.state["_init_args"], strict=False)) | root.state["_init_kwargs"]
    model_type = given.pop("model_type", "DhariwalUNet")
    if not isinstance(model_type, str):
        raise UserError("its model_type is no name")
    for name, value in DDPMPP.items() if model_type == "SongUNet" else ():
        if given.pop(name, value) != value:
            raise UserError(f"SongUNet implements DDPM++ only, which has another {name}")
    for name, value in given.items():
        values = value if isinstance(value, (list, tuple)) else [value]
        if len(values) > 32 or not all(isinstance(v, (int, float)) for v in values):
            raise UserError(f"{brief(name)} is no number or short list of them")
    given.pop("use_fp16", None)  # how it computed; its weights are in float32
    low, high = given.pop("sigma_min", 0), given.pop("sigma_max", math.inf)
    if low > EDMPrecond.sigma_min or high < EDMPrecond.sigma_max:
        raise UserError(f"its noise levels are from {low} to {high}")
    sigma_data = given.pop("sigma_data", 0.5)
    return tensors, {"model_type": model_type, "network": given, "sigma_data": sigma_data}
