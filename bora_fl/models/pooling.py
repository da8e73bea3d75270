"""Classification from pooled token states: `logits = head(dropout(pool(hidden states, mask)))`, a linear layer.

A class with pooling is made from transformers' own `…ForSequenceClassification`, so that parameters keep its names.
This file needs torch and transformers alone: an exported model carries a copy of it.
"""

from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import SequenceClassifierOutput


def pool(hidden: Tensor, mask: Tensor, pooling: str) -> Tensor:
    """One vector for each text, in float32 whatever autocast is on; padding has no part in it.

    Args:
        hidden: ``[N, T, d]``, the last layer's token states.
        mask: ``[N, T]``, 1 for tokens and 0 for padding, on either side.
        pooling: ``mean`` over the tokens, ``cls``, the first token, or ``last``, the last one.

    Returns:
        ``[N, d]`` float32.
    """
    kept = mask.to(hidden.device) != 0
    if pooling == "mean":
        summed = hidden.float().masked_fill(~kept[..., None], 0.0).sum(1)
        return summed / kept.sum(1, keepdim=True).clamp(min=1)
    if pooling == "last":
        place = torch.arange(kept.shape[1], device=hidden.device)
        which = (kept * place).argmax(1)
    else:
        which = kept.int().argmax(1)
    return hidden[torch.arange(len(hidden), device=hidden.device), which].float()


class PooledClassification:
    """Mixed into a `…ForSequenceClassification`: keeps its body, and puts one linear layer in its head's place.

    Its `pooling` is one of `pool`'s, of the last layer's token states, or ``layers``: the mean over the tokens of each
    layer's, from the embeddings on, one after the other.
    """

    pooling = "mean"

    def __init__(self, config: Any) -> None:
        super().__init__(config)  # type: ignore[call-arg]
        model: Any = self
        children = {name: child for name, child in model.named_children() if name != model.base_model_prefix}
        modules = [(name, module) for name, child in children.items() for module in child.modules()]
        linear = [(n, m) for n, m in modules if isinstance(m, nn.Linear) and m.out_features == config.num_labels]
        dropout = next((m.p for _, m in modules if isinstance(m, nn.Dropout)), 0.0)
        self.head_name, last = linear[-1]
        for name in children:
            delattr(self, name)
        if getattr(model.base_model, "pooler", None) is not None:
            model.base_model.pooler = None
        self.dropout = nn.Dropout(dropout)
        width = config.hidden_size * (1 + config.num_hidden_layers if self.pooling == "layers" else 1)
        setattr(self, self.head_name, nn.Linear(width, config.num_labels, bias=last.bias is not None))
        model.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        """As the class's own forward: an output with ``logits [N, classes]``, and ``loss`` where labels are given."""
        model: Any = self
        if self.pooling == "layers":
            kwargs["output_hidden_states"] = True
        outputs = model.base_model(
            input_ids=input_ids, attention_mask=attention_mask, inputs_embeds=inputs_embeds, return_dict=True, **kwargs
        )
        hidden = outputs.last_hidden_state
        if attention_mask is None:
            attention_mask = hidden.new_ones(hidden.shape[:2])
        if self.pooling == "layers":
            features = torch.cat([pool(layer, attention_mask, "mean") for layer in outputs.hidden_states], 1)
        else:
            features = pool(hidden, attention_mask, self.pooling)
        features = features.to(hidden.dtype)
        logits = getattr(model, self.head_name)(self.dropout(features))
        loss = None
        if labels is not None:
            loss = model.loss_function(logits=logits, labels=labels, pooled_logits=logits, config=model.config)
        result = SequenceClassifierOutput(loss, logits, outputs.hidden_states, outputs.attentions)
        return result.to_tuple() if return_dict is False else result


@cache
def pooled_class(base: type, pooling: str) -> Any:
    """The class of `base`, a `…ForSequenceClassification`, with one of the poolings of `PooledClassification`."""
    return type(f"{pooling.title()}Pooled{base.__name__}", (PooledClassification, base), {"pooling": pooling})
