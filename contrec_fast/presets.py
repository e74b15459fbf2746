"""Whole configurations by name: what `contrec train --preset NAME` starts from.

None of them chooses a language model: they train the tiny one unless `backbone.path` names a
folder (with adapters: `backbone.lora_rank=16`).
"""

from collections.abc import Callable

from contrec_fast.config import Config


def contrec() -> Config:
    """ContRec as published (arXiv 2504.12007, v3 to v5), without this project's additions.

    Diffusion and dispersive losses beside a text loss of weight 0.1, no ranking loss; 200
    ancestral (DDPM) steps with guidance 2 on the exp schedule; a user token; item vectors and
    tokenizer stay as pretrained. Bonus and text weight are those of the authors' released code.
    Its dispersive weight of 0.5 goes with a loss of the opposite sign; with the paper's sign, so
    much of it outweighs the diffusion loss, hence 0.1.
    """
    config = Config()
    config.prompt.user_token = True
    config.head.bag = False
    config.head.schedule, config.head.timesteps = "exp", 200
    config.head.method, config.head.steps, config.head.guidance = "ddpm", 200, 2.0
    config.training.train_items = config.training.train_tokens = False
    config.training.diffusion_weight = 1.0
    config.training.dispersive_weight = 0.1
    config.training.ranking_weight = 0.0
    config.training.text_weight = 0.1
    config.retrieval.bonus = 0.05
    return config


def deftrec() -> Config:
    """DeftRec, the first version of the paper (arXiv 2504.12007v1).

    As `contrec`, but negatives instead of dispersion: diffusion, contrastive denoising and BPR
    losses of weight 1 each, and lists by similarity alone (no bonus). BPR is taken on what the
    sampler gives, through all of its steps, so there are as few as by default.
    """
    config, default = contrec(), Config().head
    config.head.method, config.head.steps = default.method, default.steps
    config.head.guidance = default.guidance
    config.training.dispersive_weight = 0.0
    config.training.contrastive_weight = 1.0
    config.training.bpr_weight = 1.0
    config.retrieval.bonus = 0.0
    return config


def tokens() -> Config:
    """Continuous tokens only, for larger data on a CPU: no titles are read, nothing is written.

    This project's own: without titles a prompt is only as long as its items have tokens.
    """
    config = Config()
    config.prompt.text = "none"
    config.retrieval.bonus = 0.0
    config.training.batch_size = 64
    return config


def demo_config() -> Config:
    """Sizes for the synthetic shop of `contrec demo`: minutes on two CPU cores."""
    config = Config()
    config.lightgcn.epochs = 40
    config.tokenizer.epochs = 100
    config.backbone.vocabulary = 1000
    config.training.batch_size = 16
    config.training.epochs = 25
    return config


PRESETS: dict[str, Callable[[], Config]] = {
    "default": Config,
    "contrec": contrec,
    "deftrec": deftrec,
    "tokens": tokens,
}


def preset(name: str) -> Config:
    """A new configuration of PRESETS; ValueError, in one line, for another name."""
    if name not in PRESETS:
        raise ValueError(f"preset: expected one of {', '.join(PRESETS)}, got {name!r}")
    return PRESETS[name]()
