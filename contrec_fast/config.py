"""The configuration tree: one dataclass per part, one YAML file for all of them."""

import copy
import dataclasses
import difflib
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import yaml

from contrec_fast.names import DENOISERS, MAX_STEPS, METHODS, PREDICTIONS, SCHEDULES

# Other whole numbers are 1 or more.
MAY_BE_ZERO = ("seed", "core", "epochs", "layers", "lora_rank", "patience", "warmup_steps")
NAMES = {
    "holdout": ("test", "validation", "none"),
    "kind": ("sigma-vae", "residual-quantizer"),
    "text": ("full", "response", "none"),
    "denoiser": DENOISERS,
    "schedule": SCHEDULES,
    "prediction": PREDICTIONS,
    "method": METHODS,
    "space": ("item", "tokenizer"),
    "source": ("hidden", "response"),
    "precision": ("fp32", "bf16"),
}
SHARES = ("dropout", "mask_ratio", "condition_dropout", "lora_dropout")
POSITIVE = ("clip_norm", "dispersive_tau", "ranking_temperature")  # 0 divides, or learns nothing
# Other whole numbers are below 2^31, so that no library's counter overflows, other floats finite.
LARGEST = {
    "seed": 2**63 - 1,
    "templates": 10,
    "timesteps": MAX_STEPS - 1,
    "draws": MAX_STEPS - 1,
    "bonus": 1e30,  # `ops.topk.LARGEST_BONUS`
}


@dataclass
class DataConfig:
    """What is read of the data (`data.read_data`).

    items: a table of titles and categories beside CSV or Parquet interactions; "" for the file
    beside them, if there is one. holdout: the target, which lists are judged by, is each user's
    last item ("test") or, with that one left out, the one before it ("validation"), or there is
    none and everything is trained on, to serve ("none"). core: users and items with fewer
    interactions are dropped, again and again until none is left. shuffle_ties: interactions of a
    user at the same time in random order (by the seed) instead of the file's.
    """

    items: str = ""
    holdout: str = "test"
    core: int = 0
    shuffle_ties: bool = False


@dataclass
class LightGCNConfig:
    """Collaborative vectors (`models.lightgcn`)."""

    dim: int = 64
    layers: int = 2
    epochs: int = 100
    learning_rate: float = 5e-3
    batch_size: int = 2048
    weight_decay: float = 1e-4


@dataclass
class TokenizerConfig:
    """Item vectors to continuous tokens (`models.tokenizer`) or, as the ablation, to the
    embeddings of discrete codes (`models.quantizer`). codes: size of each of its codebooks."""

    kind: str = "sigma-vae"
    tokens: int = 2
    codes: int = 64
    epochs: int = 150
    learning_rate: float = 1e-3
    batch_size: int = 256
    dropout: float = 0.1
    mask_ratio: float = 0.1
    sigma: float = 0.5
    mean_weight: float = 0.5
    redundancy_weight: float = 0.5


@dataclass
class BackboneConfig:
    """The language model: a model folder, or "tiny" to make one from the sizes below.

    lora_rank: 0 trains all weights; otherwise low-rank adapters of that rank on all linear layers.
    """

    path: str = "tiny"
    hidden: int = 64
    layers: int = 2
    heads: int = 2
    vocabulary: int = 3000
    lora_rank: int = 0
    lora_alpha: int = 32
    lora_dropout: float = 0.05


@dataclass
class PromptConfig:
    """What the language model reads and writes (`data.prompts`).

    text: "full", "response" (titles of the history are left out) or "none" (continuous tokens
    only; nothing is written). templates: how many of the ten wordings training varies over.
    user_token: start with a token of what the user chose before the items that are shown.
    """

    text: str = "full"
    templates: int = 10
    user_token: bool = False
    history: int = 20
    title_length: int = 50
    response_tokens: int = 40


@dataclass
class HeadConfig:
    """The diffusion head. Its sampler is the one that training unrolls.

    space: what is diffused, item vectors or their continuous tokens, which are then decoded.
    source: conditions come from hidden states of the history, or from the response's token
    embeddings, as in the released code: in training those of the true response, which names the
    target, at inference those of the one that is written. bag: conditions from hidden states
    also see the sum of the whole history's item vectors. diffusion: off makes the condition
    itself the vector, for comparison.
    """

    diffusion: bool = True

    space: str = "item"
    source: str = "hidden"
    bag: bool = True
    prediction: str = "x0"
    denoiser: str = "mlp"
    width: int = 128
    depth: int = 3
    separable: bool = False
    schedule: str = "exp"
    timesteps: int = 200
    method: str = "ddim"
    steps: int = 3
    guidance: float = 0.0
    condition_dropout: float = 0.1


@dataclass
class TrainingConfig:
    """The main training loop (`training.loop`).

    patience: 0 trains `epochs`; otherwise the best epoch by NDCG@10 on each user's last training
    item is looked for first, until it has not improved for that many epochs, and the model is
    then trained anew, on everything, for as many. train_items: item vectors learn, too, at
    item_learning_rate: their entries are near 1, and each item is seen seldom.
    train_tokens: the tokenizer learns on, by every loss whose prompts show its tokens: each
    batch's items are encoded anew, with gradients. Weights of losses: 0 leaves one out.
    """

    epochs: int = 20
    patience: int = 0
    precision: str = "fp32"
    train_items: bool = True
    train_tokens: bool = True
    batch_size: int = 32
    learning_rate: float = 2e-3
    item_learning_rate: float = 2e-2
    weight_decay: float = 0.01
    warmup_steps: int = 50
    clip_norm: float = 1.0
    dropout: float = 0.4
    diffusion_weight: float = 1.0
    dispersive_weight: float = 0.1
    dispersive_tau: float = 0.5
    contrastive_weight: float = 0.0
    bpr_weight: float = 0.0
    ranking_weight: float = 1.0
    ranking_temperature: float = 0.1
    text_weight: float = 1.0


@dataclass
class RetrievalConfig:
    """Hybrid retrieval: the weight pi of the bonus for items whose category the text names.

    draws: vectors per user; an item's score is its best one. filter_seen: leave out the items of
    the user's history.
    """

    bonus: float = 0.1
    draws: int = 1
    filter_seen: bool = True


@dataclass
class Config:
    """Everything a run depends on besides its data."""

    seed: int = 0
    data: DataConfig = field(default_factory=DataConfig)
    lightgcn: LightGCNConfig = field(default_factory=LightGCNConfig)
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)
    backbone: BackboneConfig = field(default_factory=BackboneConfig)
    prompt: PromptConfig = field(default_factory=PromptConfig)
    head: HeadConfig = field(default_factory=HeadConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    retrieval: RetrievalConfig = field(default_factory=RetrievalConfig)


def _sections() -> dict[str, type]:
    return {f.name: f.type for f in dataclasses.fields(Config) if dataclasses.is_dataclass(f.type)}


def settings() -> list[str]:
    """The dotted name of every setting: "seed", "data.items", ..."""
    parts = {name: dataclasses.fields(kind) for name, kind in _sections().items()}
    top = [f.name for f in dataclasses.fields(Config) if f.name not in parts]
    return top + [f"{name}.{f.name}" for name, fields in parts.items() for f in fields]


def load_config(path: str | Path, base: Config | None = None) -> Config:
    """Read a YAML file; what it leaves out is as in `base`, which by default is `Config()`.

    Raises:
        ValueError: not YAML, an unknown key (the nearest known ones are named), or a value of
        another type, unknown or out of range, in one line that names the file and the key.
    """
    try:
        tree = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"{path}: expected a readable YAML file: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: expected UTF-8 text, got {error}") from None
    except yaml.YAMLError as error:
        raise ValueError(f"{path}: expected YAML, got {' '.join(str(error).split())}") from None
    config = copy.deepcopy(base or Config())
    try:
        _set_all(config, {} if tree is None else tree)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    return config


def apply_overrides(config: Config, overrides: Sequence[str]) -> Config:
    """A copy of a configuration with settings like "head.steps=5" changed; later ones win.

    A value is read as YAML and checked as in a file: `data.items=""` needs its quotes.

    Raises:
        ValueError: no "=", an unknown key (the nearest known ones are named), or a value that a
        file may not have either, in one line that starts with the key.
    """
    config = copy.deepcopy(config)
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals:
            raise ValueError(f"expected KEY=VALUE such as head.steps=5, got {override!r}")
        if key not in settings():
            raise _unknown(key)
        try:
            value = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise ValueError(f"{key}: expected YAML, got {' '.join(str(error).split())}") from None
        section, _, name = key.rpartition(".")
        _set_all(config, {section: {name: value}} if section else {name: value})
    return config


def check(config: Config) -> None:
    """Raise ValueError, in one line that starts with a setting's name, for what cannot work.

    That is a value that a file may not have, or settings that contradict one another; what
    depends on the data shows when that is read.
    """
    _set_all(Config(), dataclasses.asdict(config))
    backbone, head, training = config.backbone, config.head, config.training
    reads_text = config.prompt.text != "none"
    discrete = config.tokenizer.kind == "residual-quantizer"
    if backbone.path == "tiny" and backbone.hidden % (2 * backbone.heads):  # rotary positions
        raise ValueError(
            f"backbone.hidden: expected a multiple of 2 x {backbone.heads} heads, "
            f"got {backbone.hidden}"
        )
    if backbone.path != "tiny" and not (Path(backbone.path) / "config.json").is_file():
        raise ValueError(
            "backbone.path: expected 'tiny' or a Hugging Face model folder, found no config.json "
            f"in {backbone.path!r}"
        )
    if config.tokenizer.batch_size < 2 and not discrete:  # batch norm needs two rows
        raise ValueError("tokenizer.batch_size: expected at least 2 for batch norm, got 1")
    if head.steps > head.timesteps:
        raise ValueError(
            f"head.steps: expected at most head.timesteps ({head.timesteps}), got {head.steps}"
        )
    if head.source == "response" and not reads_text:
        raise ValueError("head.source: expected 'hidden' where prompt.text is 'none'")
    if head.space == "tokenizer" and discrete:
        raise ValueError(
            "head.space: expected 'item' where tokenizer.kind is 'residual-quantizer', "
            "got 'tokenizer'"
        )
    losses = ["ranking", "bpr"] + ["diffusion", "dispersive", "contrastive"] * head.diffusion
    weights = [f"{name}_weight" for name in losses + ["text"] * reads_text]
    if not any(getattr(training, weight) for weight in weights):
        raise ValueError(f"training: expected one of {', '.join(weights)} above 0, got none")


def save_config(config: Config, path: str | Path) -> None:
    """Write the whole tree as YAML."""
    Path(path).write_text(yaml.safe_dump(dataclasses.asdict(config), sort_keys=False))


def _set_all(part, tree, section: str = "") -> None:
    """Set fields of a dataclass of the tree to those of a mapping, checked key by key."""
    if not isinstance(tree, dict):
        raise ValueError(f"{section and section + ': '}expected a mapping, got {repr(tree)[:60]}")
    kinds = {f.name: f.type for f in dataclasses.fields(part)}
    for key, value in tree.items():
        name = f"{section}.{key}" if section else str(key)
        if key not in kinds:
            raise _unknown(name)
        if dataclasses.is_dataclass(kinds[key]):
            _set_all(getattr(part, key), value, name)
        else:
            setattr(part, key, _number_or_name(kinds[key], key, value, name))


def _unknown(key: str) -> ValueError:
    """The error for a dotted name that is none; it names what may have been meant."""
    section, _, name = key.rpartition(".")
    last = {setting: setting.rpartition(".")[2] for setting in settings()}
    near = [setting for setting in last if last[setting] == name]  # in other sections
    near = difflib.get_close_matches(key, near, n=1, cutoff=0.8) or near
    if not near:
        section, _, name = key.partition(".")
        inside = [setting for setting in last if setting.startswith(f"{section}.")]
        pool = {setting: last[setting] for setting in inside or last}
        if not inside:
            pool |= {part: part for part in _sections()}
        close = difflib.get_close_matches(name or key, pool.values(), n=1, cutoff=0.6)
        near = [setting for setting in pool if pool[setting] in close]
        near = near or inside or [f.name for f in dataclasses.fields(Config)]
    names = ", ".join(map(repr, near))
    return ValueError(f"expected a known setting such as {names}, got {key!r}")


def _number_or_name(kind, key: str, value, where: str):
    """A single setting, checked for its type and for its range or the names it may have."""
    if kind is float and type(value) in (int, str):
        try:
            value = float(value)  # YAML takes 1e-3, which has no point, for a string
        except (ValueError, OverflowError):
            pass
    if type(value) is not kind:
        raise ValueError(f"{where}: expected {kind.__name__}, got {value!r}")
    if key in NAMES and value not in NAMES[key]:
        raise ValueError(f"{where}: expected one of {', '.join(NAMES[key])}, got {value!r}")
    if kind is int and value < (least := 0 if key in MAY_BE_ZERO else 1):
        raise ValueError(f"{where}: expected at least {least}, got {value}")
    if kind is float and not 0 <= value < math.inf:
        raise ValueError(f"{where}: expected a finite number, 0 or more, got {value}")
    most = LARGEST.get(key, 2**31 - 1 if kind is int else math.inf)
    if kind in (int, float) and value > most:
        raise ValueError(f"{where}: expected at most {most}, got {value}")
    if key in POSITIVE and value == 0:
        raise ValueError(f"{where}: expected a number above 0, got {value}")
    if key in SHARES and value >= 1:
        raise ValueError(f"{where}: expected a share below 1, got {value}")
    return value
