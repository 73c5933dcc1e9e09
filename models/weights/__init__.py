"""Weights: files as they are stored (`weight_files`), names of every release known
(`vit_names`, `timm_names`), and loading all or none of them into a model (`load`)."""

from ...moved import old_names

__getattr__ = old_names(__name__)
