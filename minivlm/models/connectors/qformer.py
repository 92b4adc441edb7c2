"""BLIP-2's Q-Former (Li et al. 2023): learnt queries read the picture by cross-attention."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from minivlm.models.base import Connector, VisionEncoder
from minivlm.models.configs import QFormerConfig


class QFormerConnector(Connector):
    """Queries -> Q-Former -> linear layer. ``freeze: ["qformer*", "query_tokens"]`` trains the layer alone.

    A frozen Q-Former has no dropout, and no gradients unless the encoder below it trains.
    """

    front_names = ("query_tokens", "qformer")

    def __init__(self, config: QFormerConfig, encoder: VisionEncoder, output_size: int):
        super().__init__()
        from transformers import Blip2QFormerConfig, Blip2QFormerModel

        self.tokens_per_image = config.num_query_tokens
        self.front_shape = (config.num_query_tokens, config.hidden_size)
        hf = Blip2QFormerConfig(
            hidden_size=config.hidden_size,
            num_hidden_layers=config.num_layers,
            num_attention_heads=config.num_heads,
            intermediate_size=config.intermediate_size,
            cross_attention_frequency=config.cross_attention_every,
            encoder_hidden_size=encoder.hidden_size,
            hidden_dropout_prob=config.dropout,
            attention_probs_dropout_prob=config.dropout,
        )
        self.query_tokens = nn.Parameter(0.02 * torch.randn(1, config.num_query_tokens, config.hidden_size))
        self.qformer = Blip2QFormerModel(hf)
        self.linear = nn.Linear(config.hidden_size, output_size)

    def train(self, mode: bool = True) -> QFormerConnector:
        """Set train mode, except for a frozen Q-Former."""
        super().train(mode)
        if not any(p.requires_grad for p in self.qformer.parameters()):
            self.qformer.eval()
        return self

    def forward(self, features: Tensor) -> Tensor:
        """[N, tokens, channels] -> [N, num_query_tokens, output_size]."""
        return self.finish(self.front(features))

    def front(self, features: Tensor) -> Tensor:
        """[N, tokens, channels] -> the queries' hidden states [N, num_query_tokens, hidden_size]."""
        inputs = (features, self.query_tokens, *self.qformer.parameters())
        with torch.set_grad_enabled(torch.is_grad_enabled() and any(t.requires_grad for t in inputs)):
            queries = self.query_tokens.expand(len(features), -1, -1)
            return self.qformer(query_embeds=queries, encoder_hidden_states=features).last_hidden_state

    def finish(self, hidden: Tensor) -> Tensor:
        """[N, num_query_tokens, hidden_size] -> [N, num_query_tokens, output_size]."""
        return self.linear(hidden)
