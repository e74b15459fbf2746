"""The released ContRec code (github.com/Quhaoh233/ContRec): its checkpoints, and itself, faster.

A whole Lightning checkpoint, from prompts to top-K lists:

    model = load_released_checkpoint("last.ckpt", "Llama-3.2-1B-Instruct")
    predictor = model.predictor(item_vectors, user_vectors)  # LightGCN's, [N, D] and [U, D]
    lists = predictor.predict(prompts, histories, users, k=10)  # scores, ids, vectors, texts

Its parts, in our modules:

    released = load_released("last.ckpt")
    llm = load_released_backbone("last.ckpt", "Llama-3.2-1B-Instruct")
    condition = released.condition_encoder(released.output_decoder(embeddings))
    vectors = released.plan()(condition, seed=0)

Or in a program that runs the released code, whose objects then sample by a plan:

    accelerate_released(model.diffusion_net, model.ddpm)

Nothing in a file is executed: pickles are read with `weights_only=True`. Sizes are read from the
tensors. One error names all keys that are missing, unknown or of a wrong shape or dtype. Not loaded
is what the release never uses (`emb_mlp`, `diff_mlp`) and the tokenizers of its first version and
of DeftRec (`blocks.`), which are another architecture. DeftRec's diffusion network is another one,
too, and is refused; the tokenizers that it trains on their own (its `vae.py`) load. Dropout is left
out, as in inference.

Quirks of the release that change what inference computes are followed only where a checkpoint was
trained with them, or where a flag says so:

- `constant_noise` (of the loaders, True): all tokens of a sigma-VAE are shifted by one constant
  vector, two numbers drawn from seed 42, which is not in the checkpoint; its language model has
  learned from such tokens.
- `batch_padding` (of `predict`, False): a response that is shorter than the longest one of its
  batch is padded on its right, up to that length, and only then on its left; so a user's vector
  depends on who else is in the batch. Without it all padding is on the left, as in training. With
  it, a call is a batch; the release's have ten users.
- `zero_excluded` (of `predict`, False): by "inner" and "cos", excluded items get score 0 instead of
  being left out, and so rank above items of negative scores. By "mse" they come last, where there
  are (-inf, -1) here.
- The latest item of a history is not excluded by "mse" and "inner": pass `excluded` without it.
- Texts give no bonus: the pattern that should find what they name matches the empty string only.
- Ten wordings of the prompt are drawn at random, at inference, too: `predict` takes the prompts.
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
