"""Checkpoints: one safetensors file, replaced whole, from which training goes on exactly."""

import dataclasses
import hashlib
import json
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from contrec_fast.config import Config
from contrec_fast.data.files import whole_file
from contrec_fast.data.interactions import Dataset
from contrec_fast.names import CHECKPOINT

MOMENTS = ("step", "exp_avg", "exp_avg_sq")  # AdamW's state of a parameter


class Checkpoints:
    """The latest state of one training run in a folder (None keeps nothing).

    Random numbers need no saving: training seeds them anew for every epoch.

    Attributes:
        state: what the last `save` was given, {} for a new run. has_weights: a model is saved.
        writes: off only keeps `state`; of several processes, one writes. processes: how many
        train together; with another number, an epoch's batches are others.

    Raises:
        ValueError: the folder belongs to other data or settings, or cannot be read.
    """

    def __init__(self, folder: Path | None, dataset: Dataset, config: Config):
        self.path = None if folder is None else Path(folder) / CHECKPOINT
        self.fingerprint = "" if folder is None else _fingerprint(dataset, config)
        self.state, self.has_weights = {}, False
        self.writes, self.processes = True, 1
        if self.path is None:
            return
        for leftover in self.path.parent.glob(f".{CHECKPOINT}.*"):  # of a process killed in `save`
            leftover.unlink(missing_ok=True)
        if not self.path.exists():
            return
        try:
            with safe_open(self.path, "pt") as file:
                self.state = json.loads(file.metadata()["state"])
                self.has_weights = bool(file.keys())
        except (SafetensorError, KeyError, TypeError, ValueError) as error:
            raise ValueError(
                f"{self.path}: expected a checkpoint, got {error}; remove the folder to start anew"
            ) from None
        if self.state.pop("fingerprint", None) != self.fingerprint:
            raise ValueError(
                f"{self.path.parent}: expected checkpoints of the same data and settings, got "
                "those of another run; remove the folder to start anew"
            )
        self.processes = self.state.pop("processes", 1)

    def join(self, processes: int, writes: bool) -> None:
        """Be one of so many processes.

        Raises:
            ValueError: the checkpoint is of another number of them.
        """
        if self.state and processes != self.processes:
            raise ValueError(
                f"{self.path.parent}: expected as many processes as the run was started with "
                f"({self.processes}), got {processes}; remove the folder to start anew"
            )
        self.processes, self.writes = processes, writes

    def save(self, state: dict, model: nn.Module | None = None, optimizer=None) -> None:
        """Replace the checkpoint: `state` (JSON), and the model and optimizer if given."""
        self.state, self.has_weights = state, model is not None
        if self.path is None or not self.writes:
            return
        tensors = dict(_saved(model)) if model else {}
        for name, parameter in model.named_parameters() if model else ():
            moments = optimizer.state.get(parameter, {})
            tensors |= {f"{kind}:{name}": moments[kind] for kind in MOMENTS if kind in moments}
        own = {"fingerprint": self.fingerprint, "processes": self.processes}
        metadata = {"state": json.dumps(state | own)}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with whole_file(self.path) as path:
            save_file({n: t.detach().contiguous() for n, t in tensors.items()}, path, metadata)

    @torch.no_grad()
    def restore(self, model: nn.Module, optimizer) -> None:
        """Put what was saved into a model and an optimizer of the same architecture."""
        with safe_open(self.path, "pt") as file:
            saved = set(file.keys())
            for name, tensor in _saved(model):
                tensor.copy_(file.get_tensor(name))
            for name, parameter in model.named_parameters():
                if f"step:{name}" in saved:
                    moments = {kind: file.get_tensor(f"{kind}:{name}") for kind in MOMENTS}
                    # AdamW counts its steps on the CPU.
                    optimizer.state[parameter] = {
                        kind: value if kind == "step" else value.to(parameter.device)
                        for kind, value in moments.items()
                    }


def _saved(model: nn.Module):
    """(name, tensor) of all that training or pretraining decides; not a frozen language model."""
    for name, parameter in model.named_parameters():
        if parameter.requires_grad or not name.startswith("backbone."):
            yield name, parameter
    for name, buffer in model.named_buffers():
        if name in model.state_dict() and not name.startswith("backbone."):
            yield name, buffer


def _fingerprint(dataset: Dataset, config: Config) -> str:
    digest = hashlib.sha256(json.dumps(dataclasses.asdict(config)).encode())
    items = dataset.items
    for column in (dataset.user_ids, items.ids, items.titles, items.categories):
        digest.update(json.dumps(column).encode())
    for history in dataset.histories:
        digest.update(history.tobytes() + b"|")
    return digest.hexdigest()
