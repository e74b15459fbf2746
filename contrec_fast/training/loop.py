"""Training from a dataset to a ContRec model."""

import math
import time
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator, DistributedDataParallelKwargs
from accelerate.utils import broadcast_object_list

from contrec_fast.config import Config, TrainingConfig, check
from contrec_fast.data.interactions import Dataset
from contrec_fast.data.prompts import Prompts, Window
from contrec_fast.environment import default_device
from contrec_fast.models.cold_start import fit_text_map
from contrec_fast.models.contrec import ContRec
from contrec_fast.training.build import build
from contrec_fast.training.checkpoint import Checkpoints
from contrec_fast.training.report import TrainingLog

CHECK_EVERY = 20  # steps between looks at the losses, each of which waits for the device


def train(
    dataset: Dataset,
    config: Config,
    progress,
    checkpoint: Path | None = None,
    log: TrainingLog | None = None,
) -> ContRec:
    """Train all stages on a dataset's histories; its held-out targets are not looked at.

    With `training.patience`, the number of epochs is found first, on the last item of each
    history; the model is then trained anew on everything for as many. Started with `accelerate
    launch` or `torchrun`, processes share each epoch's batches.

    Args:
        progress: shows long work (`progress.ProgressBars`). checkpoint: folder in which the
        state is kept after every epoch, and from which an interrupted run goes on to the same
        weights. log: records the figures of every epoch.

    Raises:
        ValueError: no user has two items, the configuration does not fit together (`check`), or
        the checkpoints are of another run or another number of processes.
        FloatingPointError: a loss is not finite.
    """
    check(config)
    if not any(len(history) > 1 for history in dataset.histories):
        raise ValueError("histories: expected a user with at least two items, found none")
    if config.training.patience and max(map(len, dataset.histories)) < 3:
        raise ValueError("training.patience: expected a user with at least three items, found none")
    checkpoints = Checkpoints(checkpoint, dataset, config)
    run = _Run(config, progress, checkpoints, log)
    state = checkpoints.state
    if state:
        search = " of the search for the best epoch" if state["phase"] == "search" else ""
        progress.say(f"going on after epoch {state['epoch']}{search}")
    if config.training.patience and state.get("phase") != "final":
        searched, best = run.search(dataset.for_validation())
        run.save({"phase": "final", "epoch": 0, "stop": best, "searched": searched})
        progress.say(f"best epoch {best} of {searched}; training anew on everything")
    return run.final(dataset)


class _Run:
    """What the phases of a training run share."""

    def __init__(self, config: Config, progress, checkpoints: Checkpoints, log):
        self.config, self.progress, self.checkpoints, self.log = config, progress, checkpoints, log
        self.accelerator = Accelerator(
            cpu=default_device().type == "cpu",  # where torchrun needs to be told
            kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=True)],
        )
        checkpoints.join(self.accelerator.num_processes, self.accelerator.is_main_process)
        self.accelerator.wait_for_everyone()  # all have read the same checkpoint

    def search(self, dataset: Dataset) -> tuple[int, int]:
        """Epochs tried, and which of them had the best validation NDCG@10."""
        t, state = self.config.training, dict(self.checkpoints.state)
        state = state or {"phase": "search", "epoch": 0, "best": -1.0, "best_epoch": 0}
        left = t.epochs if state["epoch"] - state["best_epoch"] < t.patience else state["epoch"]
        for model, figures in self._epochs(dataset, state, left):
            if figures is None:
                break
            # The main process's, so that rounding elsewhere does not make one stop alone.
            figures["ndcg@10"] = broadcast_object_list([_validate(model, dataset)])[0]
            if figures["ndcg@10"] > state["best"]:
                state |= {"best": figures["ndcg@10"], "best_epoch": state["epoch"]}
            self._record(state["epoch"], figures)
            if state["epoch"] - state["best_epoch"] >= t.patience:
                break
        return state["epoch"], state["best_epoch"]

    def final(self, dataset: Dataset) -> ContRec:
        """The model after the last epoch, in evaluation mode."""
        state = dict(self.checkpoints.state) or {"phase": "final", "epoch": 0, "searched": 0}
        stop = state.get("stop", self.config.training.epochs)
        for trained, figures in self._epochs(dataset, state, stop):
            model = trained.eval()
            if figures is not None:
                self._record(state["searched"] + state["epoch"], figures)
        model.update_tokens()
        if self.adapters is not None:
            model.backbone = self.adapters.merge_and_unload()
        fit_text_map(model, dataset.items)
        return model

    def _record(self, epoch: int, figures: dict[str, float]) -> None:
        if self.log and self.accelerator.is_main_process:
            self.log.epoch(epoch, **figures)

    def _epochs(self, dataset: Dataset, state: dict, stop: int):
        """Train up to epoch `stop`, yielding (model, figures) after each; `state` is kept up.

        If none is left, (model, None) once.

        The state that a checkpoint holds is that of the caller, after it has dealt with the epoch.
        """
        config, t, accelerator = self.config, self.config.training, self.accelerator
        resumed = self.checkpoints.has_weights
        accelerator.free_memory()  # of the search's model
        model, self.adapters = build(dataset, config, self.progress, pretrain=not resumed)
        parameters = [p for p in model.parameters() if p.requires_grad]
        items = [p for p in parameters if p is model.item_vectors]
        others = [p for p in parameters if p is not model.item_vectors]
        groups = [
            {"params": others, "peak": t.learning_rate},
            {"params": items, "peak": t.item_learning_rate},
        ]
        optimizer = torch.optim.AdamW(groups, weight_decay=t.weight_decay)
        wrapped, stepper = accelerator.prepare(model, optimizer)
        if wrapped is not model:
            # Equal from now on, and some are as large as the catalog.
            wrapped.broadcast_buffers = False
        if resumed:
            self.checkpoints.restore(model, optimizer)
        else:
            self.save(state, model, optimizer)
        prompts = Prompts(
            dataset.items, model.text_tokenizer, config.tokenizer.tokens, config.prompt
        )
        steps = len(self._batches(dataset, 0))
        name = "ContRec, held out" if state["phase"] == "search" else "ContRec"
        advance = self.progress.stage(name, stop * steps, "steps", state["epoch"] * steps)
        if stop == state["epoch"]:
            yield model, None
        for epoch in range(state["epoch"], stop):
            torch.manual_seed(_mix(config.seed, epoch, accelerator.process_index))
            rng = np.random.default_rng([config.seed, epoch, 1])
            model.train()
            meter = _Meter(epoch, t)
            for step, windows in enumerate(self._batches(dataset, epoch), 1):
                factor = _warmup_cosine(epoch * steps + step - 1, t, t.epochs * steps)
                for group in optimizer.param_groups:
                    group["lr"] = group["peak"] * factor
                batch = prompts.training_batch(windows, rng).to(accelerator.device)
                losses = wrapped(batch)
                loss = sum(getattr(t, f"{name}_weight") * value for name, value in losses.items())
                optimizer.zero_grad()
                accelerator.backward(loss)
                accelerator.clip_grad_norm_(parameters, t.clip_norm)
                stepper.step()
                meter.add(losses, len(windows))
                if step % CHECK_EVERY == 0 or step == steps:
                    meter.look()
                advance(epoch=epoch + 1, **meter.figures)
            state["epoch"] = epoch + 1
            model.update_tokens()
            yield model, meter.figures | {"learning_rate": t.learning_rate * factor}
            self.save(state, model, optimizer)

    def save(self, state: dict, model: ContRec | None = None, optimizer=None) -> None:
        self.checkpoints.save(dict(state), model, optimizer)
        self.accelerator.wait_for_everyone()

    def _batches(self, dataset: Dataset, epoch: int) -> list[list[Window]]:
        """This process's share of an epoch's batches; all processes get equally many."""
        batches = epoch_batches(
            dataset, self.config, np.random.default_rng([self.config.seed, epoch])
        )
        number, processes = self.accelerator.process_index, self.accelerator.num_processes
        whole = max(len(batches) // processes, 1) * processes
        return (batches * processes)[:whole][number::processes]


class _Meter:
    """Means of an epoch's losses over its users, and users per second."""

    def __init__(self, epoch: int, training: TrainingConfig):
        self.epoch, self.started = epoch, time.monotonic()
        self.figures: dict[str, float] = {}
        self._sums, self._users = {}, 0

    def add(self, losses: dict[str, torch.Tensor], users: int) -> None:
        self._users += users
        for name, value in losses.items():
            self._sums[name] = self._sums.get(name, 0.0) + value.detach() * users

    def look(self) -> None:
        """Bring `figures` up to date; FloatingPointError if a loss was not finite."""
        means = {name: float(total) / self._users for name, total in self._sums.items()}
        for name, mean in means.items():
            if not math.isfinite(mean):
                raise FloatingPointError(
                    f"epoch {self.epoch + 1}: expected a finite {name} loss, got {mean}"
                )
        rate = self._users / max(time.monotonic() - self.started, 1e-9)
        self.figures = means | {"rate": rate}


def epoch_batches(dataset: Dataset, config: Config, rng: np.random.Generator) -> list[list[Window]]:
    """One epoch: windows of histories, of at most `prompt.history` + 1 items, in batches.

    They cover every history; where a long one is cut is random, except that its last window
    ends with it. Windows of similar length share a batch, which saves padding.
    """
    size = config.prompt.history
    windows, lengths = [], []
    for history in dataset.histories:
        parts = math.ceil((len(history) - 1) / size)
        shift = int(rng.integers(max(parts * size - len(history) + 2, 1)))
        for part in range(parts):
            end = len(history) - part * size + (shift if part else 0)
            windows.append(Window(history[:end], max(0, end - size - 1)))
            lengths.append(end - windows[-1].start)
    order = rng.permutation(len(windows))
    chunk = 16 * config.training.batch_size
    batches = []
    for start in range(0, len(order), chunk):
        near = sorted(order[start : start + chunk], key=lengths.__getitem__)
        for first in range(0, len(near), config.training.batch_size):
            batches.append([windows[i] for i in near[first : first + config.training.batch_size]])
    return [batches[i] for i in rng.permutation(len(batches))]


def _validate(model: ContRec, dataset: Dataset) -> float:
    """NDCG@10 of the latent path on a dataset's targets."""
    from contrec_fast.engine import Engine
    from contrec_fast.evaluation.metrics import rank_metrics

    rows = np.flatnonzero(dataset.targets >= 0)
    k = min(10, len(dataset.items))
    lists = Engine(model, dataset, text=False).recommend(rows, k)
    ids = np.pad(lists.ids, ((0, 0), (0, 10 - k)), constant_values=-1)
    return rank_metrics(ids, dataset.targets[rows], (10,))["ndcg@10"]


def _warmup_cosine(step: int, training: TrainingConfig, total: int) -> float:
    """Learning-rate factor: linear warm-up, then half a cosine down to zero."""
    warmup = min(training.warmup_steps, total // 2)
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(total - warmup, 1)))


def _mix(*numbers: int) -> int:
    """One seed from several numbers."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> 1)
