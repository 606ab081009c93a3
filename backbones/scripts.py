"""--teacher sd15:PATH_OR_HUB_ID and the like, for the scripts."""

import re
from pathlib import Path

import torch

import edm_teacher as edm
from backbones.causal_wan import CausalWan
from backbones.denoiser import Backbone, read_image
from backbones.edm_files import load_denoiser
from backbones.loading import load_backbone
from backbones.lora import Role, load_generator


def load_teacher(cfg, causal: bool = False) -> Backbone | Role:
    """The teacher; labels are the lines of --prompts FILE.   causal: a CausalWan.

    Where videos start from pictures, a tab and the picture's path follow each prompt. With
    --lora-rank copies are adapters, with --amp on a base in bfloat16. --sample FOLDER: a run's
    generator."""
    if (path := cfg.sample or cfg.teacher).endswith((".pkl", ".pth")):
        return load_denoiser(path, cfg.device).requires_grad_(False)
    if causal and not cfg.teacher.startswith("wan:"):
        raise edm.UserError(f"--teacher {cfg.teacher}: this script takes wan: alone.")
    if not cfg.prompts:
        raise edm.UserError(f"--teacher {cfg.teacher} needs --prompts FILE, one prompt a line.")
    lines = read_lines(cfg.prompts)
    if len(size := edm.numbers(cfg.size)) not in (0, 2, 3):
        raise edm.UserError(f"--size {cfg.size}: expected height,width or height,width,frames.")
    dtype = torch.bfloat16 if cfg.lora_rank and cfg.amp else torch.float32
    backbone = load_backbone(cfg.teacher, dtype, cfg.device, size=size)
    if causal and backbone.needs_picture:
        raise edm.UserError(f"--teacher {cfg.teacher}: this script's videos start from no picture.")
    if any(len(line) != 1 + backbone.needs_picture for line in lines):
        wanted = "a tab and a picture's path" if backbone.needs_picture else "no tab and nothing"
        raise edm.UserError(f"--prompts {cfg.prompts}: {wanted} after each prompt.")
    backbone = CausalWan(backbone) if causal else backbone
    images = [read_image(path, *backbone.pixels) for _, *paths in lines for path in paths]
    backbone.use_prompts([line[0] for line in lines], images)
    if cfg.gradient_checkpointing:
        backbone.gradient_checkpointing()
    if cfg.sample:
        return load_generator(backbone, cfg.sample)
    return Role(backbone, cfg.lora_rank, adapter=False) if cfg.lora_rank else backbone


def read_lines(path: str) -> list[list[str]]:
    """The lines of --prompts, each split at its tabs; they end at LF or CRLF, at nothing else."""
    text = Path(path).read_bytes().decode("utf-8-sig", "replace")
    if "\0" in text or "\ufffd" in text:  # UTF-16, Latin-1
        raise edm.UserError(f"--prompts {path}: the file is not in UTF-8: save it as UTF-8.")
    lines = re.split("\r?\n", text.rstrip("\r\n"))
    if blank := [i for i, line in enumerate(lines, 1) if not line.strip()]:
        raise edm.UserError(f"--prompts {path}: line {blank[0]} is blank: each is a prompt.")
    return [line.split("\t") for line in lines]
