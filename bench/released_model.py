"""The released modules, and the released way from prompts to lists: the "before" of `compat`.

Restated in our own words, like `released.py`, from the public repository Quhaoh233/ContRec (MIT;
DreamRec.py, model_interface.py, utils.py and vae.py under its code/), with its state-dict keys:
`ReleasedModel(...).state_dict()` is that of a whole Lightning checkpoint. Attributes that the
release's objects have are called as there. Nothing was added to slow it down.

The language model is any causal LM folder with adapters (the release: Llama-3.2-1B-Instruct,
quantised to four bits, in float16). Left out are losses, metrics and the reading of files; drawn
at random are the weights.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from released import ReleasedDenoiser, TokenEncoder, insert_tokens, look_up, pad_prompts, rank
from released import schedule as exp_schedule
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

ADAPTED = ["up_proj", "down_proj", "gate_proj", "k_proj", "q_proj", "v_proj", "o_proj"]
PROMPT_TOKENS = 1024  # every prompt is padded to this
MASKED = -(2.0**32) + 1


class Attention(nn.Module):
    """Causal attention of one head; keys and queries whose entries sum to zero are padding."""

    def __init__(self, dim: int, dropout: float):
        super().__init__()
        self.linear_q, self.linear_k, self.linear_v = (nn.Linear(dim, dim) for _ in range(3))
        self.dropout = nn.Dropout(dropout)

    def forward(self, queries: Tensor, keys: Tensor) -> Tensor:
        q, k, v = self.linear_q(queries), self.linear_k(keys), self.linear_v(keys)
        scores = torch.bmm(q, k.transpose(1, 2)) / q.shape[-1] ** 0.5
        real = torch.sign(torch.abs(keys.sum(dim=-1)))[:, None, :].repeat(1, q.shape[1], 1)
        scores = torch.where(real == 0, torch.ones_like(scores) * MASKED, scores)
        before = torch.tril(torch.ones_like(scores[0]))[None].repeat(len(scores), 1, 1)
        scores = torch.where(before == 0, torch.ones_like(scores) * MASKED, scores)
        asking = torch.sign(torch.abs(queries.sum(dim=-1)))[..., None].repeat(1, 1, k.shape[1])
        return torch.bmm(self.dropout(scores.softmax(-1) * asking), v) + queries


class FeedForward(nn.Module):
    """Two convolutions of width 1, a residual and a norm."""

    def __init__(self, dim: int, dropout: float):
        super().__init__()
        self.w_1, self.w_2 = nn.Conv1d(dim, dim, 1), nn.Conv1d(dim, dim, 1)
        self.layer_norm, self.dropout = nn.LayerNorm(dim), nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        y = self.w_2(F.relu(self.w_1(x.transpose(1, 2)))).transpose(1, 2)
        return self.layer_norm(self.dropout(y) + x)


class Network(ReleasedDenoiser):
    """`Tenc`: denoiser and condition encoder.

    Args:
        item_embeddings: [N, D], not in the state dict. positions: S. two_layers: "mlp2".
    """

    def __init__(self, item_embeddings: Tensor, positions: int, two_layers: bool, dropout=0.1):
        dim = item_embeddings.shape[1]
        super().__init__(dim, two_layers)
        self.item_embeddings = item_embeddings
        self.positional_embeddings = nn.Embedding(positions, dim)
        self.dropout = nn.Dropout(dropout)
        self.ln_1, self.ln_2, self.ln_3 = (nn.LayerNorm(dim) for _ in range(3))
        self.mh_attn, self.feed_forward = Attention(dim, dropout), FeedForward(dim, dropout)
        # Never called, but in every checkpoint.
        self.emb_mlp = nn.Sequential(nn.SiLU(), nn.Linear(dim, 2 * dim))
        self.diff_mlp = nn.Sequential(
            nn.Linear(3 * dim, 2 * dim), nn.GELU(), nn.Linear(2 * dim, dim)
        )

    def forward_uncon(self, x: Tensor, t: Tensor) -> Tensor:
        return self.unconditional(x, t)

    def predict(self, states: Tensor, len_states, diff: "Sampler") -> tuple[Tensor, Tensor]:
        """States [B, S, D] to vectors [B, D] and their products with all items [B, N]."""
        positions = torch.arange(states.shape[1]).to(states.device)
        x = self.dropout(states + self.positional_embeddings(positions))
        x = self.ln_3(self.feed_forward(self.ln_2(self.mh_attn(self.ln_1(x), x))))
        h = torch.stack([own[-1] for own in x])
        vectors = diff.sample(self.forward, self.forward_uncon, h)
        return vectors, vectors @ self.item_embeddings.clone().T


class Sampler:
    """`diffusion`: ancestral sampling, tables on the host, noise from torch's generator."""

    def __init__(self, timesteps: int, w: float, betas: Tensor | None = None):
        self.timesteps, self.w = timesteps, w
        tables = exp_schedule(timesteps) if betas is None else tables_of(betas)
        self.posterior_mean_coef1, self.posterior_mean_coef2, self.posterior_variance = tables

    @torch.no_grad()
    def p_sample(self, model_forward, model_forward_uncon, x, h, t, t_index):
        x0 = (1 + self.w) * model_forward(x, h, t) - self.w * model_forward_uncon(x, t)
        mean = look_up(self.posterior_mean_coef1, t) * x0
        mean = mean + look_up(self.posterior_mean_coef2, t) * x
        if t_index == 0:
            return mean
        return mean + torch.sqrt(look_up(self.posterior_variance, t)) * torch.randn_like(x)

    @torch.no_grad()
    def sample(self, model_forward, model_forward_uncon, h: Tensor) -> Tensor:
        x = torch.randn_like(h)
        for n in reversed(range(self.timesteps)):
            t = torch.full((h.shape[0],), n, device=h.device, dtype=torch.long)
            x = self.p_sample(model_forward, model_forward_uncon, x, h, t, n)
        return x


def tables_of(betas: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Posterior coefficients [T] of another schedule than the default one."""
    bars = (1 - betas).cumprod(0)
    before = F.pad(bars[:-1], (1, 0), value=1.0)
    of_x = (1 - before) * (1 - betas).sqrt() / (1 - bars)
    return betas * before.sqrt() / (1 - bars), of_x, betas * (1 - before) / (1 - bars)


class Tokenizer(TokenEncoder):
    """`SigmaVae`, with the decoder and the position that inference does not use."""

    def __init__(self, dim: int, hidden: int, ways: int):
        super().__init__(dim, hidden, ways)
        with torch.random.fork_rng([]):
            torch.manual_seed(42)
            self.epsilon = torch.randn(1, hidden, dtype=torch.float32)
            self.sigma = torch.normal(0, 0.1, size=(1,), dtype=torch.float32)
        self.decoder = nn.Sequential(
            *(nn.Linear(hidden, 256), nn.BatchNorm1d(256), nn.Dropout(0.5), nn.ReLU()),
            *(nn.Linear(256, 128), nn.BatchNorm1d(128), nn.Dropout(0.2), nn.ReLU()),
            nn.Linear(128, dim),
        )
        self.pos = nn.Embedding(1, dim)


class Residual(nn.Module):
    def __init__(self, *layers: nn.Module):
        super().__init__()
        self.layers = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x) + x


class OutputDecoder(nn.Module):
    """`MLPDecoder`: embeddings of a response [B, L, H] to states [B, S, D]."""

    def __init__(self, tokens: int, positions: int, hidden: int, dim: int):
        super().__init__()

        def block(width_in: int, width_out: int) -> list[nn.Module]:
            return [nn.ReLU(), nn.Dropout(0.2), nn.Linear(width_in, width_out)]

        self.dim_block = nn.Sequential(*block(hidden, dim), nn.ReLU())
        self.length_block = nn.Sequential(
            Residual(*block(tokens, tokens)), *block(tokens, positions), nn.ReLU()
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.length_block(self.dim_block(x).transpose(1, 2)).transpose(1, 2)


class Generated(NamedTuple):
    texts: list[str]
    vectors: Tensor
    products: Tensor  # with all items


class ReleasedModel(nn.Module):
    """`ModelInterface`: all that inference uses, with random weights around a base LM.

    Args:
        base: folder of a causal LM with its tokenizer. item_vectors: [N, D], user_vectors: [U, D].
        two_layers: "mlp2". ways: K. positions: S, the release's seq_size. tokens: L, its
        max_gen_length. timesteps, w: of the sampler. rank: of the adapters.
    """

    def __init__(
        self, base: Path, item_vectors: Tensor, user_vectors: Tensor, two_layers: bool,
        ways: int = 2, positions: int = 4, tokens: int = 64, timesteps: int = 200, w: float = 2.0,
        rank: int = 16,
    ):  # fmt: skip
        super().__init__()
        self.tokenizer = AutoTokenizer.from_pretrained(base, padding_side="left")
        if self.tokenizer.pad_token_id is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token
        items = [f"<continuous_token_{k}>" for k in range(ways)]
        users = [f"<user_continuous_token_{k}>" for k in range(ways)]
        self.tokenizer.add_tokens(["<diff>", "<\\diff>", *items, *users])
        self.item_token, self.user_token = self.tokenizer.convert_tokens_to_ids(
            [items[0], users[0]]
        )
        model = AutoModelForCausalLM.from_pretrained(
            base, dtype=torch.float32, attn_implementation="eager"
        )
        model.resize_token_embeddings(len(self.tokenizer), mean_resizing=False)
        adapters = LoraConfig(r=rank, lora_alpha=32, lora_dropout=0.05, target_modules=ADAPTED)
        self.model = get_peft_model(model, adapters)
        dim, hidden = item_vectors.shape[1], model.get_input_embeddings().embedding_dim
        self.item_embeds, self.user_embeds = item_vectors, user_vectors
        self.diffusion_net = Network(item_vectors, positions, two_layers)
        self.ddpm = Sampler(timesteps, w)
        self.user_encoder = Tokenizer(dim, hidden, ways)
        self.item_encoder = Tokenizer(dim, hidden, ways)
        self.output_decoder = OutputDecoder(tokens, positions, hidden, dim)
        self.tokens = tokens
        for name, parameter in self.model.named_parameters():
            if "lora_B" in name:  # which are zero at first
                nn.init.normal_(parameter, std=0.05)

    def checkpoint(self) -> dict:
        """What Lightning saves, the parts that matter."""
        settings = {"timesteps": self.ddpm.timesteps, "w": self.ddpm.w, "beta_sche": "exp"}
        return {"epoch": 3, "state_dict": self.state_dict(), "hyper_parameters": settings}

    @torch.no_grad()
    def generate(
        self, prompts: Sequence[str], histories: Sequence[Sequence[int]], users: Sequence[int]
    ) -> Generated:
        """Responses and vectors of one batch of prompts."""
        encoded = self.tokenizer(list(prompts)).input_ids
        token_ids = pad_prompts(encoded, self.tokenizer.pad_token_id, PROMPT_TOKENS)
        lengths = torch.tensor([min(len(ids), PROMPT_TOKENS) for ids in encoded])
        mask = (torch.arange(PROMPT_TOKENS) >= PROMPT_TOKENS - lengths[:, None]).long()
        table = self.model.get_input_embeddings().weight
        embedded = insert_tokens(
            token_ids, histories, self.item_embeds, self.item_encoder, table, self.item_token
        )
        for row, user in enumerate(users):
            own = self.user_encoder(self.user_embeds[user][None])
            places = torch.nonzero(token_ids[row] == self.user_token).squeeze()
            for way in range(len(own)):
                embedded[row, places + way, :] = own[way].to(embedded.dtype)
        sequences = self.model.generate(
            inputs_embeds=embedded, attention_mask=mask, do_sample=False, num_beams=1,
            max_new_tokens=self.tokens, min_new_tokens=1,
            pad_token_id=self.tokenizer.pad_token_id, output_scores=True,
            return_dict_in_generate=True,
        ).sequences  # fmt: skip
        texts = self.tokenizer.batch_decode(
            sequences, skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        padded = pad_prompts(sequences.tolist(), self.tokenizer.pad_token_id, self.tokens)
        embeddings = self.model.get_input_embeddings()(padded)
        states = self.output_decoder(embeddings.to(self.item_embeds.dtype))
        lengths = [states.shape[1]] * len(states)
        return Generated(texts, *self.diffusion_net.predict(states, lengths, self.ddpm))

    @torch.no_grad()
    def rank(
        self, found: Generated, interacted: Sequence[Sequence[int]], measure: str, pi: float = 0.05
    ) -> tuple[Tensor, Tensor]:
        """Scores [B, N] (distances for "mse") and item ids [B, N], best first.

        Excluded are all interacted items by cosine, all but the last by the other measures.
        """
        if measure == "cos":
            return rank(found.vectors, self.item_embeds, interacted)
        excluded = torch.zeros(found.products.shape)
        for row, items in enumerate(interacted):
            excluded[row, list(items[:-1])] = 1
        if measure == "mse":
            rows = [torch.cdist(own[None], self.item_embeds) for own in found.vectors]
            scores = torch.cat(rows)
            scores[excluded == 1] = 1_000_000
            return scores, torch.argsort(scores, dim=1)
        scores = found.products * (1 + pi)  # the text score of every item
        scores[excluded == 1] = 0
        return scores, torch.argsort(scores, dim=1, descending=True)


def write_prompts(
    titles: Sequence[str], histories: Sequence[Sequence[int]], ways: int = 2, user: bool = True
) -> list[str]:
    """Prompts in the release's form, in other words: titles, tokens, perhaps a user, a question."""
    shown = "<diff>" + "".join(f"<continuous_token_{k}>" for k in range(ways)) + "<\\diff>"
    owner = shown.replace("<cont", "<user_cont") if user else ""
    role = "You know the shop and what goes well together. An example: who bought a tent and a "
    role += "sleeping bag may want a camping stove, too.\n### Input: What this user"
    return [
        f"{role}{owner} bought:{''.join(f' {titles[i][:50]} {shown},' for i in history)} and what "
        "comes next? ### Response:"
        for history in histories
    ]
