"""The machines by name (`registry`), and those beside ViTCoD's, a file each."""
