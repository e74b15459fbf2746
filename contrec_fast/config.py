"""The configuration tree: one dataclass per part, one YAML file for all of them."""

import dataclasses
import difflib
import math
from dataclasses import dataclass, field
from pathlib import Path

import yaml

from contrec_fast.models.denoisers import DENOISERS
from contrec_fast.models.schedules import METHODS, PREDICTIONS, SCHEDULES

# Other whole numbers are 1 or more.
MAY_BE_ZERO = ("seed", "core", "epochs", "layers", "lora_rank", "patience", "warmup_steps")
NAMES = {
    "holdout": ("test", "validation"),
    "kind": ("sigma-vae", "residual-quantizer"),
    "text": ("full", "response", "none"),
    "denoiser": tuple(DENOISERS),
    "schedule": SCHEDULES,
    "prediction": PREDICTIONS,
    "method": METHODS,
    "space": ("item", "tokenizer"),
    "source": ("hidden", "response"),
    "precision": ("fp32", "bf16"),
}
SHARES = ("dropout", "mask_ratio", "condition_dropout", "lora_dropout")


@dataclass
class DataConfig:
    """What is read of the data (`data.read_data`).

    items: a table of titles and categories beside CSV or Parquet interactions; "" for the file
    beside them, if there is one. holdout: the target is each user's last item ("test") or, with
    that one left out, the one before it ("validation"). core: users and items with fewer
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
    vocabulary: int = 2000
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
    embeddings. bag: conditions from hidden states also see the mean of the whole history.
    """

    space: str = "item"
    source: str = "hidden"
    bag: bool = True
    prediction: str = "x0"
    denoiser: str = "adaln"
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
    then trained anew, on everything, for as many. train_items: item vectors learn, too.
    train_tokens: the tokenizer learns on. Weights of losses: 0 leaves one out.
    """

    epochs: int = 25
    patience: int = 0
    precision: str = "fp32"
    train_items: bool = True
    train_tokens: bool = True
    batch_size: int = 32
    learning_rate: float = 2e-3
    weight_decay: float = 0.01
    warmup_steps: int = 50
    clip_norm: float = 1.0
    dropout: float = 0.3
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


def demo_config() -> Config:
    """Sizes for the synthetic shop of `contrec demo`: minutes on two CPU cores."""
    config = Config()
    config.lightgcn.epochs = 40
    config.tokenizer.epochs = 100
    config.backbone.vocabulary = 1000
    config.training.batch_size = 16
    config.training.epochs = 25
    return config


def load_config(path: str | Path) -> Config:
    """Read a YAML file; what it leaves out keeps its default.

    Raises:
        ValueError: not YAML, an unknown key (the nearest known one is named), or a value of
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
    return _build(Config, {} if tree is None else tree, str(path))


def save_config(config: Config, path: str | Path) -> None:
    """Write the whole tree as YAML."""
    Path(path).write_text(yaml.safe_dump(dataclasses.asdict(config), sort_keys=False))


def _build(cls, tree, where: str):
    """An instance of a dataclass from a mapping, checked key by key."""
    if not isinstance(tree, dict):
        raise ValueError(f"{where}: expected a mapping, got {tree!r}")
    fields = {f.name: f for f in dataclasses.fields(cls)}
    values = {}
    for key, value in tree.items():
        if key not in fields:
            near = difflib.get_close_matches(str(key), fields, n=1, cutoff=0.5) or fields
            names = ", ".join(repr(name) for name in near)
            raise ValueError(f"{where}: expected a known key such as {names}, got {key!r}")
        kind = fields[key].type
        if dataclasses.is_dataclass(kind):
            values[key] = _build(kind, value, f"{where}: {key}")
            continue
        values[key] = _number_or_name(kind, key, value, f"{where}: {key}")
    return cls(**values)


def _number_or_name(kind, key: str, value, where: str):
    """A single setting, checked for its type and for its range or the names it may have."""
    if kind is float and type(value) in (int, str):
        try:
            value = float(value)  # YAML takes 1e-3, which has no point, for a string
        except ValueError:
            pass
    if type(value) is not kind:
        raise ValueError(f"{where}: expected {kind.__name__}, got {value!r}")
    if key in NAMES and value not in NAMES[key]:
        raise ValueError(f"{where}: expected one of {', '.join(NAMES[key])}, got {value!r}")
    if kind is int and value < (least := 0 if key in MAY_BE_ZERO else 1):
        raise ValueError(f"{where}: expected at least {least}, got {value}")
    if kind is float and not 0 <= value < math.inf:
        raise ValueError(f"{where}: expected a finite number, 0 or more, got {value}")
    if key in SHARES and value >= 1:
        raise ValueError(f"{where}: expected a share below 1, got {value}")
    return value
