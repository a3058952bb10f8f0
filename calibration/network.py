"""The training forward pass: transformers' own modules, arranged for batches of equal images.

Shapes: B screens, N patches and C = N / 4 cells each, sequences of length L, width D.
"""

import torch
from torch import nn
from torch.nn import functional as F
from transformers import Glm4vForConditionalGeneration
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD
from transformers.modeling_utils import AttentionInterface
from transformers.models.glm4v.modeling_glm4v import apply_rotary_pos_emb
from transformers.vision_utils import get_vision_position_ids

from calibration.batches import IGNORE, KINDS_OF_CELL, Batch
from calibration.words import WORDS

PATCH, MERGE = 14, 2
SEEK, FETCH = 1, 2  # decoder layers: a label finds its element, the answer looks at the label
_EQUAL = "flash_equal_images"  # "flash" makes transformers pass the image boundaries on


def _attend_equal(module, query, key, value, attention_mask, scaling, cu_seq_lens_q, **kwargs):
    """Attention within each of B equally long images packed into [1, heads, B * N, 64]."""
    count = len(cu_seq_lens_q) - 1
    split = [x[0].unflatten(1, (count, -1)).transpose(0, 1) for x in (query, key, value)]
    output = F.scaled_dot_product_attention(*split, scale=scaling)
    return output.transpose(1, 2), None


AttentionInterface.register(_EQUAL, _attend_equal)


def patchify(images: torch.Tensor) -> torch.Tensor:
    """uint8 [B, H, W, 3] to [B * N, 1176], as Glm4vImageProcessor does for one image at a time."""
    batch, height, width, _ = images.shape
    scale = torch.tensor(OPENAI_CLIP_STD) * 255
    pixels = (images.float() - torch.tensor(OPENAI_CLIP_MEAN) * 255) / scale
    step = PATCH * MERGE
    blocks = pixels.view(batch, height // step, MERGE, PATCH, width // step, MERGE, PATCH, 3)
    blocks = blocks.permute(0, 1, 4, 2, 5, 7, 3, 6).unsqueeze(6)  # B gh gw mh mw 3 1 14 14
    return blocks.expand(*(-1,) * 6, 2, -1, -1).reshape(-1, 3 * 2 * PATCH * PATCH)


class Trainee(nn.Module):
    """The model and, for training only, heads that read each cell of the picture.

    The heads give the encoder a dense target: which element covers the cell, the word on it, where
    its centre is and whether a badge sits there. What they read is what the decoder gets to see.
    """

    def __init__(self, model: Glm4vForConditionalGeneration):
        super().__init__()
        self.model = model
        model.model.visual.config._attn_implementation = _EQUAL
        width = model.config.text_config.hidden_size
        self.seen: dict[int, dict] = {}
        for layer in (SEEK, FETCH, FETCH + 1):
            attention = model.model.language_model.layers[layer].self_attn
            attention.register_forward_pre_hook(self._remember, with_kwargs=True)
        self.kind_head = nn.Linear(width, len(KINDS_OF_CELL))
        self.word_head = nn.Linear(width, len(WORDS))
        self.place_head = nn.Linear(width, 3)
        self.label_digits = nn.Linear(width, 40)
        self.answer_digits = nn.Linear(width, 40)
        self.focus_head = nn.Linear(width, 1)

    def encode(self, images: torch.Tensor) -> torch.Tensor:
        """uint8 [B, H, W, 3] to the visual tokens [B, C, D]."""
        visual = self.model.model.visual
        batch, height, width, _ = images.shape
        grid = torch.tensor([[1, height // PATCH, width // PATCH]])
        count = int(grid.prod())
        where = get_vision_position_ids(grid, MERGE)
        projection = visual.patch_embed.proj
        x = F.linear(patchify(images), projection.weight.flatten(1), projection.bias)
        x = visual.post_conv_layernorm(x)
        nothing = x.new_zeros(count, x.shape[-1], dtype=torch.float32)
        place = visual.embeddings(nothing, [count], grid, where[:, 0], where[:, 1])
        x = (x.view(batch, count, -1) + place).flatten(0, 1)
        rotary = tuple(part.repeat(batch, 1) for part in visual.rotary_pos_emb(x, where))
        bounds = torch.arange(batch + 1, dtype=torch.int32) * count
        for block in visual.blocks:
            x = block(x, cu_seqlens=bounds, max_seqlen=count, position_embeddings=rotary)
        x = visual.post_layernorm(x)
        down = visual.downsample
        kernel = down.weight.permute(0, 2, 3, 1).flatten(1)
        x = F.linear(x.reshape(-1, kernel.shape[1]), kernel, down.bias)
        return visual.merger(x).view(batch, count // MERGE**2, -1)

    def read_cells(self, cells: torch.Tensor, batch: Batch) -> dict[str, torch.Tensor]:
        """The losses of the heads on visual tokens [B, C, D], and the word accuracy."""
        cells = cells.float()
        kind = F.cross_entropy(self.kind_head(cells).flatten(0, 1), batch.cell_kind.flatten())
        covered = batch.cell_word != IGNORE
        words = self.word_head(cells[covered])
        word = F.cross_entropy(words, batch.cell_word[covered])
        place = self.place_head(cells)
        centre = (place[..., :2] + 0.5)[covered] - batch.cell_centre[covered]
        badge = F.binary_cross_entropy_with_logits(place[..., 2], batch.cell_badge)
        focus = F.binary_cross_entropy_with_logits(self.focus_head(cells)[..., 0], batch.cell_focus)
        right = (words.argmax(-1) == batch.cell_word[covered]).float().mean()
        return {
            "kind": kind,
            "word": word,
            "centre": centre.abs().mean(),
            "badge": badge,
            "focus": focus,
            "word_accuracy": right,
        }

    def _remember(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        self.seen[module.layer_idx] = kwargs

    def _miss(
        self, layer: int, batch: Batch, row: torch.Tensor, at: torch.Tensor, wanted: torch.Tensor
    ) -> torch.Tensor:
        """-log of the attention that tokens (row, at), [P], pay to what is wanted, bool [P, L].

        Of each group of heads that share keys, the first is meant.
        """
        attention = self.model.model.language_model.layers[layer].self_attn
        hidden, rotary = (self.seen[layer][k] for k in ("hidden_states", "position_embeddings"))
        size, group = attention.head_dim, attention.num_key_value_groups
        query = attention.q_proj(hidden).unflatten(-1, (-1, size))[:, :, ::group].transpose(1, 2)
        key = attention.k_proj(hidden).unflatten(-1, (-1, size)).transpose(1, 2)
        query, key = apply_rotary_pos_emb(query, key, *rotary)
        pairs = [query[i, :, at[row == i]] @ key[i].mT for i in range(len(key))]  # heads, P', L
        scores = torch.cat(pairs, dim=1).transpose(0, 1)
        scores = (scores * attention.scaling).masked_fill(
            ~visible(batch.segment)[row, at][:, None], -torch.inf
        )
        hit = scores.masked_fill(~wanted[:, None], -torch.inf).logsumexp(-1)
        return (scores.logsumexp(-1) - hit).mean()

    def seek(self, batch: Batch) -> dict[str, torch.Tensor]:
        """The losses of attention that misses the element a question names, after `answer`.

        In one layer the label's last token has to look at the cells with that label, or at the
        first token of all where the screen has none; in the next, the answer's tokens at the label.
        After either, the place of the element has to be known digit by digit.
        Both would emerge by themselves, but thousands of steps later.
        """
        row, at = (batch.sought != IGNORE).nonzero(as_tuple=True)
        wanted = torch.zeros(len(row), batch.ids.shape[1], dtype=torch.bool)
        found = batch.cell_word[row] == batch.sought[row, at][:, None]
        shown = batch.ids == self.model.config.image_token_id
        wanted[shown[row]] = found.flatten()
        wanted[:, 0] = ~found.any(1)
        seek = self._miss(SEEK, batch, row, at, wanted)
        centre = (batch.cell_centre[row] * found[..., None]).sum(1) / found.sum(1, keepdim=True)
        thousandths = torch.where(found.any(1, keepdim=True), centre * 1000, -1).long()
        hidden = self.seen[FETCH]["hidden_states"][row, at]
        digits = _digit_loss(self.label_digits(hidden), thousandths)

        places = torch.full((*batch.ids.shape, 2), -1)
        places[row, at] = thousandths
        row, at = (batch.fetched >= 0).nonzero(as_tuple=True)
        target = batch.fetched[row, at]
        wanted = F.one_hot(target, batch.ids.shape[1]).bool()
        hidden = self.seen[FETCH + 1]["hidden_states"][row, at]
        digits = digits + _digit_loss(self.answer_digits(hidden), places[row, target])
        return {"seek": seek, "fetch": self._miss(FETCH, batch, row, at, wanted), "digits": digits}

    def answer(self, cells: torch.Tensor, batch: Batch) -> torch.Tensor:
        """Logits [tokens, vocabulary] at the labelled positions of the packed sequences."""
        language = self.model.model.language_model
        embedded = language.embed_tokens(batch.ids)
        shown = batch.ids == self.model.config.image_token_id
        embedded = embedded.masked_scatter(shown[..., None], cells)
        mask = visible(batch.segment)
        # the outputs are those of the decoder's layers; a 4D mask is taken as it is
        hidden = language(
            inputs_embeds=embedded,
            position_ids=batch.positions,
            attention_mask=mask[:, None],
            use_cache=False,
        ).last_hidden_state
        return self.model.lm_head(hidden[batch.labels != IGNORE])


def _digit_loss(logits: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
    """Cross entropy of the hundreds and tens of x and y: logits [P, 40], places [P, 2] or -1."""
    digits = torch.stack((places // 100, places // 10 % 10), dim=-1).flatten(1)
    digits = torch.where(places.repeat_interleave(2, 1) < 0, IGNORE, digits)
    return F.cross_entropy(logits.unflatten(1, (4, 10)).flatten(0, 1), digits.flatten())


def visible(segment: torch.Tensor) -> torch.Tensor:
    """[B, L, L]: a token sees what came before it in the prefix and in its own segment."""
    length = segment.shape[1]
    causal = torch.ones(length, length, dtype=torch.bool).tril()
    same = segment[:, :, None] == segment[:, None, :]
    return causal & (same | (segment == 0)[:, None, :])


def answer_loss(logits: torch.Tensor, batch: Batch) -> torch.Tensor:
    """Weighted cross entropy of the answers' tokens."""
    at = batch.labels != IGNORE
    losses = F.cross_entropy(logits.float(), batch.labels[at], reduction="none")
    weights = batch.weights[at]
    return (losses * weights).sum() / weights.sum()
