"""ContRec: a language model over titles and continuous tokens, and a diffusion head."""

from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from contrec_fast import ops
from contrec_fast.config import Config, save_config
from contrec_fast.data import Dataset, load_dataset, save_dataset
from contrec_fast.data.files import require_free, whole_folder
from contrec_fast.data.prompts import IGNORED, PromptBatch
from contrec_fast.models.backbone import load_backbone
from contrec_fast.models.latent import LatentPath, make_tokenizer, saved_config
from contrec_fast.models.losses import bpr_loss
from contrec_fast.models.quantizer import ResidualQuantizer
from contrec_fast.models.tokenizer import SigmaVAE


class ContRec(LatentPath):
    """Continuous-token recommender (arXiv 2504.12007).

    Args:
        backbone, text_tokenizer: a causal LM and its tokenizer (`backbone.load_backbone`).
        tokenizer: fitted to the item vectors (`make_tokenizer`).
        item_vectors: [N, D] collaborative vectors; a copy of them learns on (unless
        `training.train_items` is off) and is what is retrieved.
        dataset: the catalog and the users that `recommend` knows.

    Attributes:
        item_vectors: [N, D] what is retrieved. collaborative: [N, D] as given. item_tokens:
        [N, K, H] tokens of the items as the language model reads them. text_map: [H + 1, D]
        from an item's text to its vector (`models.cold_start`).
    """

    def __init__(
        self,
        config: Config,
        backbone,
        text_tokenizer,
        tokenizer: SigmaVAE | ResidualQuantizer,
        item_vectors: Tensor,
        dataset: Dataset | None = None,
    ):
        super().__init__()
        training = config.training
        self.config, self.backbone, self.text_tokenizer = config, backbone, text_tokenizer
        self.dataset = dataset
        self.tokenizer = tokenizer.requires_grad_(training.train_tokens).eval()
        self.item_vectors = nn.Parameter(item_vectors.clone(), requires_grad=training.train_items)
        self.register_buffer("collaborative", item_vectors.clone())
        # Codes stay what they are; continuous tokens follow the vectors that they are made of.
        discrete = isinstance(tokenizer, ResidualQuantizer)
        self.live_tokens = training.train_tokens and not discrete
        width, dim = backbone.config.hidden_size, item_vectors.shape[1]
        count = len(item_vectors)
        self.register_buffer("item_tokens", torch.zeros(count, config.tokenizer.tokens, width))
        self.register_buffer("token_rms", torch.ones(()))
        self.register_buffer("text_rms", torch.ones(()))
        self.register_buffer("text_map", torch.zeros(width + 1, dim))
        self.dropout = nn.Dropout(training.dropout)
        self.add_head(width)

    def train(self, mode: bool = True) -> "ContRec":
        """As usual, but the tokenizer stays in evaluation mode: its statistics are settled."""
        super().train(mode)
        self.tokenizer.eval()
        return self

    @torch.no_grad()
    def calibrate(self) -> None:
        """Let tokens enter at the scale of the text embeddings beside them; done once."""
        table = self.backbone.get_input_embeddings().weight
        self.text_rms.copy_(_rms(table))
        self.token_rms.copy_(_rms(self.tokenizer.encode(self.collaborative)))
        self.update_tokens()

    @torch.no_grad()
    def update_tokens(self) -> None:
        """Encode all items anew; needed after training steps and before inference."""
        vectors = self.item_vectors if self.live_tokens else self.collaborative
        for part, tokens in zip(vectors.split(8192), self.item_tokens.split(8192)):
            tokens.copy_(self.encode(part))

    def encode(self, vectors: Tensor) -> Tensor:
        """Item-space vectors [I, D] to tokens as the language model reads them [I, K, H]."""
        return self.tokenizer.encode(vectors) * (self.text_rms / self.token_rms)

    def tokens_of(self, items: Tensor) -> Tensor:
        """Tokens [I, K, H] of items [I]; in training they are encoded, with gradients."""
        if self.training and self.config.training.train_tokens:
            vectors = self.item_vectors if self.live_tokens else self.collaborative
            return self.encode(F.embedding(items, vectors))
        return self.item_tokens[items]

    def summaries(self, batch: PromptBatch) -> tuple[Tensor, Tensor]:
        """Sums of item vectors over the square root of their number, so that none is too long.

        In training, dropout leaves out whole items, so that no item comes to rely on another.

        Returns:
            [B, D] of what each user chose before the items shown (zero if nothing) and [B, M, D]
            of that and the items shown up to each.
        """
        vectors = self.item_vectors
        kept = self.dropout(vectors.new_ones(len(batch.older)))
        before, number = self.sums(batch.older, batch.older_offsets, kept)
        kept = self.dropout((batch.shown >= 0).to(vectors.dtype))
        shown = F.embedding(batch.shown.clamp(min=0), vectors) * kept[..., None]
        steps = torch.arange(1, shown.shape[1] + 1, device=shown.device)
        upto = before[:, None] + shown.cumsum(1)
        return (
            before / number[:, None].clamp(min=1).to(before.dtype).sqrt(),
            upto / (number[:, None] + steps)[..., None].to(upto.dtype).sqrt(),
        )

    def require_positions(self, longest: int) -> None:
        """Raise ValueError, in one line, if the language model has fewer positions."""
        most = getattr(self.backbone.config, "max_position_embeddings", None) or longest
        if longest > most:
            raise ValueError(
                f"prompt.history: expected prompts of at most {most} tokens, which this language "
                f"model reads, got {longest}"
            )

    def embed(self, batch: PromptBatch, room: int = 0) -> Tensor:
        """Input embeddings [B, L, H] of prompts that leave room for so many tokens more.

        Raises:
            ValueError: together they are more than the language model has positions.
        """
        self.require_positions(batch.token_ids.shape[1] + room)
        table = self.backbone.get_input_embeddings().weight
        tokens = self.tokens_of(batch.items)
        if self.config.prompt.user_token:
            tokens = torch.cat([tokens, self.encode(self.summaries(batch)[0])])
        tokens = tokens.flatten(0, 1).to(table.dtype)
        return self.dropout(ops.gather_tokens(batch.token_ids, batch.rows, table, tokens))

    def hidden_states(self, batch: PromptBatch, embedded: Tensor | None = None) -> Tensor:
        """Last hidden states [B, L, H] of prompts, whose `embed` may be given."""
        mask = batch.attention_mask
        return self.backbone.base_model(
            inputs_embeds=self.embed(batch) if embedded is None else embedded,
            attention_mask=mask,
            position_ids=(mask.cumsum(1) - 1).clamp(min=0),  # whatever the padding
            use_cache=False,
        ).last_hidden_state

    def conditions(self, hidden: Tensor, batch: PromptBatch) -> Tensor:
        """Conditions [P, D] from the hidden states [B, L, H] where the batch reads them."""
        hidden, bags = self.dropout(hidden[batch.read_row, batch.read_column]), None
        if self.bag is not None:
            bags = self.summaries(batch)[1][batch.read_row, batch.read_item]
        return self.project(hidden, bags)

    def response_conditions(self, answers: Tensor) -> Tensor:
        """Conditions [B, D] from the token ids [B, S] of responses, padded with -1."""
        answers = answers[:, : self.config.prompt.response_tokens]
        states = self.backbone.get_input_embeddings()(answers.clamp(min=0))
        return self.condition(self.dropout(states), answers >= 0)

    @torch.no_grad()
    def targets(self, items: Tensor) -> Tensor:
        """What the head is to sample for items [P]: [P, D], or [P, K * H] in tokenizer space."""
        if self.config.head.space == "item":
            return F.embedding(items, self.item_vectors)
        return self.tokens_of(items).flatten(1) / self.text_rms

    def forward(self, batch: PromptBatch) -> dict[str, Tensor]:
        """Training losses of a batch of `Prompts.training_batch`, unweighted.

        Those of the head, and `ranking` (softmax cross-entropy over the whole catalog on the
        output of the inference sampler, unrolled), `bpr` (the same output against a random
        item), `text` (next words). Losses of weight 0 are left out. With `training.precision`
        "bf16" the language model computes in that; the small rest does in float32.
        """
        training, items, losses = self.config.training, batch.next_items, {}
        embedded = self.embed(batch)
        with torch.autocast(
            batch.rows.device.type, torch.bfloat16, enabled=training.precision == "bf16"
        ):
            hidden = self.hidden_states(batch, embedded)
            if training.text_weight and self.config.prompt.text != "none":
                learned = batch.labels[:, 1:] != IGNORED
                logits = self.backbone.get_output_embeddings()(hidden[:, :-1][learned])
                losses["text"] = F.cross_entropy(logits.float(), batch.labels[:, 1:][learned])
        hidden = hidden.to(self.item_vectors.dtype)
        if self.config.head.source == "response":
            conditions = self.response_conditions(batch.answers)
            items = items[_last_reads(batch)]
        else:
            conditions = self.conditions(hidden, batch)
        negatives = torch.randint(len(self.item_vectors), items.shape, device=items.device)
        if self.config.head.diffusion:
            losses |= self.head.losses(
                conditions, self.targets(items), self.targets(negatives), training
            )
        if training.ranking_weight or training.bpr_weight:
            y, vectors = self.to_item_space(self.head.unroll(conditions)), self.item_vectors
            temperature = training.ranking_temperature
        if training.ranking_weight:
            losses["ranking"] = ops.catalog_cross_entropy(y, vectors, items, temperature).mean()
        if training.bpr_weight:
            positive, negative = F.embedding(items, vectors), F.embedding(negatives, vectors)
            losses["bpr"] = bpr_loss(y, positive, negative, temperature)
        return losses

    @torch.inference_mode()
    def write(self, batch: PromptBatch) -> tuple[Tensor, list[str]]:
        """Read prompts of `Prompts.inference_batch` and answer them, greedily.

        Returns:
            Conditions [B, D] and the texts.
        """
        room = self.config.prompt.response_tokens
        output = self.backbone.generate(
            inputs_embeds=self.embed(batch, room),
            attention_mask=batch.attention_mask,
            max_new_tokens=room,
            do_sample=False,
            pad_token_id=self.text_tokenizer.pad_token_id,
            eos_token_id=self.text_tokenizer.eos_token_id,
            return_dict_in_generate=True,
            output_hidden_states=True,
        )
        written = output.sequences
        texts = self.text_tokenizer.batch_decode(written, skip_special_tokens=True)
        if self.config.head.source == "response":
            ends = written == self.text_tokenizer.eos_token_id
            behind = ends.cumsum(1) - ends.long() > 0
            conditions = self.response_conditions(written.masked_fill(behind, -1))
        else:
            conditions = self.conditions(output.hidden_states[0][-1], batch)
        return conditions, [text.strip() for text in texts]

    @torch.inference_mode()
    def read(self, batch: PromptBatch) -> Tensor:
        """Conditions [B, D] without a text (`head.source` is "hidden")."""
        return self.conditions(self.hidden_states(batch), batch)

    @classmethod
    def fit(cls, dataset: Dataset, config: Config | None = None, progress=None) -> "ContRec":
        """Train a model on a dataset's histories; see `training.train`.

        Raises:
            TypeError: `dataset` is no Dataset, or `config` no Config.
        """
        from contrec_fast.progress import Silent
        from contrec_fast.training import train

        if not isinstance(dataset, Dataset):
            got = type(dataset).__name__
            raise TypeError(f"dataset: expected a Dataset as `read_data` gives it, got {got}")
        if not isinstance(config, Config | None):
            got = type(config).__name__
            raise TypeError(f"config: expected a Config as `load_config` gives it, got {got}")
        return train(dataset, config or Config(), progress or Silent())

    def recommend(self, users=None, histories=None, k: int = 10, progress=None):
        """Top-K lists as a pandas DataFrame; see `engine.Recommender`, which serves repeatedly."""
        from contrec_fast.engine import Recommender

        return Recommender(self).recommend(users, histories, k, progress)

    def add_items(self, frame, interactions=None) -> None:
        """Make new items recommendable without training; see `models.cold_start`."""
        from contrec_fast.models.cold_start import add_items

        add_items(self, frame, interactions)

    def save_pretrained(self, path: str | Path) -> None:
        """Write a folder with config.yaml, model.safetensors, backbone/ and data/, whole.

        Raises:
            ValueError: `path` exists and is not an empty folder.
        """
        require_free(Path(path))
        with whole_folder(Path(path)) as folder:
            save_config(self.config, folder / "config.yaml")
            self.backbone.save_pretrained(folder / "backbone")
            self.text_tokenizer.save_pretrained(folder / "backbone")
            state = {
                name: tensor.contiguous()
                for name, tensor in self.state_dict().items()
                if not name.startswith("backbone.")
            }
            save_file(state, folder / "model.safetensors")
            for file in folder.rglob("*.safetensors"):  # which come readable by their owner only
                file.chmod((folder / "config.yaml").stat().st_mode)
            if self.dataset is not None:
                save_dataset(self.dataset, folder / "data")

    @classmethod
    def from_pretrained(cls, path: str | Path) -> "ContRec":
        """Read what `save_pretrained` wrote.

        Raises:
            ValueError: a file is missing or does not fit, in one line that names it.
        """
        path = Path(path)
        config = saved_config(path, "backbone")
        dataset = load_dataset(path / "data") if (path / "data").exists() else None
        backbone, text_tokenizer = load_backbone(path / "backbone")
        try:
            state = load_file(path / "model.safetensors")
            vectors = state["item_vectors"]
            tokenizer = make_tokenizer(config, vectors.shape[1], backbone.config.hidden_size)
            model = cls(config, backbone, text_tokenizer, tokenizer, vectors, dataset)
            own = {f"backbone.{name}": value for name, value in backbone.state_dict().items()}
            model.load_state_dict(state | own)
        except (SafetensorError, KeyError, RuntimeError) as error:
            reason = " ".join(str(error).split())
            raise ValueError(f"{path / 'model.safetensors'}: does not fit: {reason}") from None
        if dataset is not None and len(dataset.items) != len(vectors):
            raise ValueError(
                f"{path / 'data'}: expected {len(vectors)} items, got {len(dataset.items)}"
            )
        return model.eval()


def _rms(x: Tensor) -> Tensor:
    return x.square().mean().sqrt().clamp(min=1e-12)


def _last_reads(batch: PromptBatch) -> Tensor:
    """[B] positions among the reads of each prompt's last one."""
    return torch.bincount(batch.read_row).cumsum(0) - 1
