"""The released model's way to a condition: from the embeddings of a response's tokens."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class ConditionEncoder(nn.Module):
    """One layer of causal attention over a response, of which the last position is the condition.

    The encoder of DreamRec (arXiv 2310.20453) as the released ContRec uses it; submodules have
    the names they have there. `x = project(states) + positions`, `y = ln_1(x) + attention(ln_1(x)
    to x)`, `h = ln_3(feed_forward(ln_2(y)))` at the last valid position. There, padding is
    recognised by states that sum to zero; here it is told.

    Args:
        width_in: of the states, H. dim: item-space width D. positions: longest response.
    """

    def __init__(self, width_in: int, dim: int, positions: int):
        super().__init__()
        self.project = nn.Linear(width_in, dim)
        self.positional_embeddings = nn.Embedding(positions, dim)
        nn.init.normal_(self.positional_embeddings.weight, std=0.02)
        self.ln_1, self.ln_2, self.ln_3 = (nn.LayerNorm(dim) for _ in range(3))
        self.mh_attn = nn.ModuleDict({f"linear_{name}": nn.Linear(dim, dim) for name in "qkv"})
        layers = {"w_1": nn.Linear(dim, dim), "w_2": nn.Linear(dim, dim)}
        self.feed_forward = nn.ModuleDict({**layers, "layer_norm": nn.LayerNorm(dim)})

    def forward(self, states: Tensor, mask: Tensor) -> Tensor:
        """States [B, S, H], S at least 1, to conditions [B, D].

        Args:
            mask: [B, S] bool, False for the padding on the right. A row without any valid
            position counts as one zero state.

        Raises:
            ValueError: S is 0 or more than there are positions.
        """
        longest = self.positional_embeddings.num_embeddings
        count = states.shape[1]
        if not 1 <= count <= longest:
            raise ValueError(f"states: expected 1 to {longest} positions, got {count}")
        states = states.masked_fill(~mask[..., None], 0.0)
        x = self.project(states) + self.positional_embeddings.weight[:count]
        last = (mask.sum(1) - 1).clamp(min=0)
        seen = torch.arange(count, device=mask.device) <= last[:, None]
        # Only the last position is read, and it sees all valid ones: one query is enough.
        query = self.ln_1(x.take_along_dim(last[:, None, None], dim=1))  # [B, 1, D]
        attention = self.mh_attn
        mixed = F.scaled_dot_product_attention(
            attention["linear_q"](query),
            attention["linear_k"](x),
            attention["linear_v"](x),
            attn_mask=seen[:, None],
        )
        y = self.ln_2(mixed + query)[:, 0]
        feed_forward = self.feed_forward
        y = feed_forward["layer_norm"](feed_forward["w_2"](F.relu(feed_forward["w_1"](y))) + y)
        return self.ln_3(y)
