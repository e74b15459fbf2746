"""The released ContRec code (github.com/Quhaoh233/ContRec): its checkpoints, and itself, faster.

From a Lightning checkpoint, in our modules:

    released = load_released("last.ckpt")
    model = load_released_backbone("last.ckpt", "Llama-3.2-1B-Instruct")
    condition = released.condition_encoder(released.output_decoder(embeddings))
    vectors = released.plan()(condition, seed=0)

Or in a program that runs the released code, whose objects then sample by a plan:

    accelerate_released(model.diffusion_net, model.ddpm)

Nothing in a file is executed: pickles are read with `weights_only=True`. Not loaded is what the
release never uses (`emb_mlp`, `diff_mlp`) and the tokenizers of its first version and of DeftRec
(`blocks.`), which are another architecture. DeftRec's diffusion network is another one, too, and
is refused; the tokenizers that it trains on their own (its `vae.py`) load. Dropout is left out, as
in inference.
"""

from contrec_fast.compat.accelerate import Acceleration, accelerate_released
from contrec_fast.compat.backbone import load_released_backbone
from contrec_fast.compat.checkpoint import load_released, load_released_tokenizer
from contrec_fast.compat.modules import (
    Released,
    ReleasedConditionEncoder,
    ReleasedOutputDecoder,
)
from contrec_fast.compat.prediction import Predictions, Predictor
from contrec_fast.compat.whole import ReleasedModel, load_released_checkpoint
from contrec_fast.models.tokenizer import fold_batch_norms

__all__ = [
    "Acceleration",
    "Predictions",
    "Predictor",
    "Released",
    "ReleasedConditionEncoder",
    "ReleasedModel",
    "ReleasedOutputDecoder",
    "accelerate_released",
    "fold_batch_norms",
    "load_released",
    "load_released_backbone",
    "load_released_checkpoint",
    "load_released_tokenizer",
]
