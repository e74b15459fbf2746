"""Files in, interactions and catalog out."""

from contrec_fast.data.interactions import Dataset, Items, read_folder, write_folder
from contrec_fast.data.shop import synthetic_shop

__all__ = ["Dataset", "Items", "read_folder", "synthetic_shop", "write_folder"]
