"""ContRec: a language model over titles and continuous tokens, and a diffusion head."""

import os
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from contrec_fast import ops
from contrec_fast.config import Config, load_config, save_config
from contrec_fast.data.prompts import IGNORED, PromptBatch
from contrec_fast.models.backbone import load_backbone
from contrec_fast.models.diffusion import DiffusionHead
from contrec_fast.models.tokenizer import SigmaVAE


class ContRec(nn.Module):
    """Continuous-token recommender (arXiv 2504.12007).

    Args:
        backbone, text_tokenizer: a causal LM and its tokenizer (`backbone.load_backbone`).
        tokenizer: trained sigma-VAE.
        item_vectors: [N, D] initial item vectors: what is retrieved and diffused; trainable.
        item_tokens: [N, K, H] continuous tokens of the items; constants.
    """

    def __init__(
        self,
        config: Config,
        backbone,
        text_tokenizer,
        tokenizer: SigmaVAE,
        item_vectors: Tensor,
        item_tokens: Tensor,
    ):
        super().__init__()
        self.config, self.backbone, self.text_tokenizer = config, backbone, text_tokenizer
        self.tokenizer = tokenizer.requires_grad_(False)
        self.item_vectors = nn.Parameter(item_vectors.clone())
        self.register_buffer("item_tokens", item_tokens.flatten(0, 1).clone())
        self.dropout = nn.Dropout(config.training.dropout)
        width, dim = backbone.config.hidden_size, item_vectors.shape[1]
        self.condition = nn.Linear(width, dim)
        self.head = DiffusionHead(dim, config.head)

    def train(self, mode: bool = True) -> "ContRec":
        """As usual, but the frozen sigma-VAE stays in evaluation mode."""
        super().train(mode)
        self.tokenizer.eval()
        return self

    def embed(self, batch: PromptBatch) -> Tensor:
        """Input embeddings [B, L, H] of prompts."""
        table = self.backbone.get_input_embeddings().weight
        tokens = self.item_tokens.to(table.dtype)
        return self.dropout(ops.gather_tokens(batch.token_ids, batch.rows, table, tokens))

    def hidden_states(self, batch: PromptBatch) -> Tensor:
        """Last hidden states [B, L, H] of prompts."""
        return self.backbone.base_model(
            inputs_embeds=self.embed(batch), attention_mask=batch.attention_mask, use_cache=False
        ).last_hidden_state

    def conditions(self, hidden: Tensor, batch: PromptBatch) -> Tensor:
        """Conditions [P, D] from the hidden states where the batch reads them."""
        return self.condition(self.dropout(hidden[batch.read_row, batch.read_column]))

    def losses(self, batch: PromptBatch) -> dict[str, Tensor]:
        """Training losses of a batch, unweighted: those of the head, and `text`."""
        hidden = self.hidden_states(batch)
        conditions = self.conditions(hidden, batch)
        losses = self.head.losses(
            conditions, batch.next_items, self.item_vectors, self.config.training
        )
        learned = batch.labels[:, 1:] != IGNORED
        logits = self.backbone.get_output_embeddings()(hidden[:, :-1][learned])
        losses["text"] = F.cross_entropy(logits, batch.labels[:, 1:][learned])
        return losses

    @torch.inference_mode()
    def write(self, batch: PromptBatch, max_tokens: int) -> tuple[Tensor, list[str]]:
        """Read prompts of `Prompts.inference_batch` and answer them, greedily.

        Returns:
            Conditions [B, D] and the texts.
        """
        output = self.backbone.generate(
            inputs_embeds=self.embed(batch),
            attention_mask=batch.attention_mask,
            max_new_tokens=max_tokens,
            do_sample=False,
            pad_token_id=self.text_tokenizer.pad_token_id,
            eos_token_id=self.text_tokenizer.eos_token_id,
            return_dict_in_generate=True,
            output_hidden_states=True,
        )
        prompt_states = output.hidden_states[0][-1]
        texts = self.text_tokenizer.batch_decode(output.sequences, skip_special_tokens=True)
        return self.conditions(prompt_states, batch), [text.strip() for text in texts]

    def save_pretrained(self, path: str | Path) -> None:
        """Write config.yaml, model.safetensors and the folder backbone/ into `path`."""
        path = Path(path)
        os.makedirs(path, exist_ok=True)
        save_config(self.config, path / "config.yaml")
        self.backbone.save_pretrained(path / "backbone")
        self.text_tokenizer.save_pretrained(path / "backbone")
        state = {
            name: tensor.contiguous()
            for name, tensor in self.state_dict().items()
            if not name.startswith("backbone.")
        }
        save_file(state, path / "model.safetensors")
        for file in path.rglob("*.safetensors"):  # which come readable by their owner only
            file.chmod((path / "config.yaml").stat().st_mode)

    @classmethod
    def from_pretrained(cls, path: str | Path) -> "ContRec":
        """Read what `save_pretrained` wrote.

        Raises:
            ValueError: a file is missing or does not fit, in one line that names it.
        """
        path = Path(path)
        if not path.is_dir():
            raise ValueError(f"{path}: expected the folder of a trained model, found none")
        for name in ("config.yaml", "model.safetensors", "backbone"):
            if not (path / name).exists():
                raise ValueError(f"{path}: expected a trained model, found no {name}")
        config = load_config(path / "config.yaml")
        backbone, text_tokenizer = load_backbone(path / "backbone")
        try:
            state = load_file(path / "model.safetensors")
            vectors, item_tokens = state["item_vectors"], state["item_tokens"]
            tokenizer = make_tokenizer(config, vectors.shape[1], backbone.config.hidden_size)
            item_tokens = item_tokens.unflatten(0, (-1, config.tokenizer.tokens))
            model = cls(config, backbone, text_tokenizer, tokenizer, vectors, item_tokens)
            own = {f"backbone.{name}": value for name, value in backbone.state_dict().items()}
            model.load_state_dict(state | own)
        except (SafetensorError, KeyError, RuntimeError) as error:
            reason = " ".join(str(error).split())
            raise ValueError(f"{path / 'model.safetensors'}: does not fit: {reason}") from None
        return model.eval()


def make_tokenizer(config: Config, dim: int, width: int) -> SigmaVAE:
    """An untrained sigma-VAE of the configured shape, D to K tokens of the backbone's width."""
    c = config.tokenizer
    return SigmaVAE(dim, width, c.tokens, c.sigma, c.mask_ratio, c.dropout)
