"""Files in, interactions and catalog out."""

from contrec_fast.data.interactions import Dataset, Items, read_folder, write_folder

__all__ = ["Dataset", "Items", "read_folder", "write_folder"]
