"""Networks for text: a bidirectional LSTM that reads word numbers."""

import torch
from torch import Tensor, nn


class BiLSTM(nn.Module):
    """Words (B, T) -> class scores (B, classes), by LSTMs over each text forwards and backwards.

    Each direction is pooled over the text's own words by their maximum, so padding has no influence on a text,
    whatever batch it stands in. The texts are reversed by their lengths instead of packed: packing would wait for the
    device in every step, and cannot be exported.
    """

    def __init__(self, words: int, width: int, hidden: int, classes: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.embedding = nn.Embedding(words, width, padding_idx=0)
        self.forwards = nn.LSTM(width, hidden, batch_first=True)
        self.backwards = nn.LSTM(width, hidden, batch_first=True)
        self.dropout = nn.Dropout(dropout)
        self.classify = nn.Linear(2 * hidden, classes)

    def forward(self, tokens: Tensor, lengths: Tensor) -> Tensor:  # (B, T) int64, (B,) int64 of at least 1
        positions = torch.arange(tokens.shape[1], device=tokens.device)[None]  # (1, T)
        padding = positions >= lengths[:, None]  # (B, T)
        reverse = (lengths[:, None] - 1 - positions).clamp(min=0)
        pooled = []
        for lstm, order in ((self.forwards, tokens), (self.backwards, tokens.gather(1, reverse))):
            states, _ = lstm(self.dropout(self.embedding(order)))  # (B, T, hidden)
            pooled.append(states.masked_fill(padding[..., None], float("-inf")).amax(1))
        return self.classify(self.dropout(torch.cat(pooled, 1)))
