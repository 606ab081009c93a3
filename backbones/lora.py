"""Adapters (LoRA, arXiv 2106.09685): generator, fake and teacher on one copy of the weights."""

import math
from functools import partial
from pathlib import Path

import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

import edm_teacher as edm
from backbones.denoiser import Backbone, Mode
from backbones.edm_files import finite, plain
from backbones.loading import read, reading

FILE = "pytorch_lora_weights.safetensors"  # the name that diffusers looks for


class Role(nn.Module):
    """The frozen base, and W x + B A x in every linear layer of its blocks. Called like the base.

    adapter=False: the base alone, the teacher. parameters() are A and B; all else is the base's. A
    deep copy, so edm_teacher.trainable_copy(teacher), is another adapter on the same base."""

    is_adapter = True

    def __init__(self, base: Backbone, rank: int, adapter: bool = True):
        super().__init__()
        self.__dict__["base"], self.rank = base, rank  # base: not a submodule
        self.weights = nn.ParameterDict()
        for name, layer in base.model.named_modules() if adapter else ():
            if isinstance(layer, nn.Linear) and "block" in name:
                a = nn.Linear(layer.in_features, rank, bias=False).weight
                b = nn.Linear(rank, layer.out_features, bias=False).weight
                nn.init.kaiming_uniform_(a, math.sqrt(5))
                key = name.replace(".", "/")
                self.weights[key + "/lora_A/weight"] = a
                self.weights[key + "/lora_B/weight"] = nn.init.zeros_(b)
                if not base.mode.adapters:
                    layer.register_forward_hook(partial(adapt, base.mode, key))
        base.mode.adapters |= adapter
        self.to(base.device)

    def forward(self, *args, **options):
        with self.base.mode.set(role=self.weights):
            return self.base(*args, **options)

    def __getattr__(self, name: str):
        own = self.__dict__.get("_modules", {})
        return own[name] if name in own else getattr(self.__dict__["base"], name)

    def __deepcopy__(self, memo):
        other = Role(self.base, self.rank)
        for name, p in self.weights.items():
            other.weights[name] = nn.Parameter(p.detach().clone(), p.requires_grad)
        return other.train(self.training)

    def save(self, path) -> None:
        """A folder for pipe.load_lora_weights of diffusers."""
        state = {f"{self.part}/{k}".replace("/", "."): p for k, p in self.weights.items()}
        edm.save_tensors(Path(path) / FILE, state)


def adapt(mode: Mode, key: str, layer: nn.Linear, args, out: Tensor) -> Tensor | None:
    """After each layer: B A x of the role that is on is added, in A's precision."""
    if mode.role:
        a, b = (mode.role[f"{key}/lora_{k}/weight"] for k in "AB")
        return (out + F.linear(F.linear(args[0].to(a.dtype), a), b)).to(out.dtype)


def three_roles(base: Backbone, rank: int) -> tuple[Role, Role, Role]:
    """(generator, fake, teacher): two adapters on one frozen base, and the base alone."""
    base.requires_grad_(False)
    return Role(base, rank), Role(base, rank), Role(base, rank, adapter=False)


def load_generator(backbone: Backbone, folder) -> Backbone | Role:
    """The backbone with the weights that `save` has written, or a Role with them."""
    file, model, prefix = Path(folder) / FILE, backbone.model, backbone.part + "."
    with reading(f"{folder} is no generator of this teacher"):
        if not file.exists():
            model.load_state_dict(read(type(model), folder).state_dict())
            return backbone
        state = {plain(k).removeprefix(prefix): v for k, v in load_file(file).items()}  # or none
        state = {k.replace(".", "/"): v for k, v in state.items()}
        role = Role(backbone, next(len(v) for k, v in state.items() if "lora_A" in k))
        finite(state)
        role.weights.load_state_dict(state)
        return role.requires_grad_(False).eval()
