"""The machines by name (`registry`), and those beside ViTCoD's, a file each."""

from ...moved import old_names

__getattr__ = old_names(__name__)
