"""Files in, interactions and catalog out."""

from contrec_fast.data.interactions import Dataset, Items, read_folder, write_folder
from contrec_fast.data.shop import synthetic_shop
from contrec_fast.data.storage import load_dataset, save_dataset
from contrec_fast.data.tables import read_data

__all__ = [
    "Dataset",
    "Items",
    "load_dataset",
    "read_data",
    "read_folder",
    "save_dataset",
    "synthetic_shop",
    "write_folder",
]
