"""Frozen lower layers whose outputs are kept: the same bits as without, and the work done once."""

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForSequenceClassification,
    BertConfig,
    BertForSequenceClassification,
    LlamaForCausalLM,
)
from transformers.modeling_outputs import ModelOutput

from bora_fl.client.site import Site
from bora_fl.config import AdapterSettings, ModelSettings, parse
from bora_fl.models import FederatedModel
from bora_fl.models.base import without_dropout
from bora_fl.models.prefix import PrefixCache, frozen_blocks
from bora_fl.simulations.engine import simulate

UPPER = "layer.1.attention.self.query,layer.1.attention.self.value"


def adapted(layers: int = 3, targets: str = "layer.2.attention.self.query", **options: object) -> FederatedModel:
    torch.manual_seed(0)
    shape = {"hidden_size": 16, "num_hidden_layers": layers, "num_attention_heads": 2, "intermediate_size": 32}
    base = BertForSequenceClassification(BertConfig(vocab_size=50, num_labels=3, pad_token_id=0, **shape))
    adapter = AdapterSettings(rank=2, num_blocks=2, target_modules=targets, **options)
    return FederatedModel(base, adapter, ModelSettings(), 0)


def batch(rows: list[int], width: int = 12) -> dict[str, torch.Tensor]:
    """Example k has 2 + k mod 11 tokens."""
    ids, mask = torch.zeros(len(rows), width, dtype=torch.long), torch.zeros(len(rows), width, dtype=torch.long)
    for place, row in enumerate(rows):
        length = min(2 + row % 11, width)
        ids[place, :length] = torch.arange(length) * 7 % 40 + 1 + row % 9
        mask[place, :length] = 1
    return {"input_ids": ids, "attention_mask": mask}


@pytest.mark.parametrize("pooling", ["mean", "layers"])
@pytest.mark.parametrize("budget", [3000, 10**7])
def test_a_run_ends_in_the_same_adapter_bit_for_bit(
    pooling: str, budget: int, tiny_config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Training, evaluation and the head's sums; the smaller budget is too small for most rows."""
    config = tiny_config | {"adapter.target-modules": UPPER, "head.init": "auto", "model.pooling": pooling}
    config |= {"run.num-rounds": 2, "run.keep-best": True}
    caches: list[PrefixCache] = []

    def made(_: int, every: bool) -> PrefixCache:
        caches.append(PrefixCache(budget, every))
        return caches[-1]

    monkeypatch.setattr("bora_fl.client.site.PrefixCache", made)
    found = []
    for name, megabytes in {"plain": 0, "kept": 1}.items():
        own = {"run.output-dir": str(tmp_path / name), "train.prefix-cache-mb": megabytes}
        folder = simulate(config | own, 3)
        found.append(load_file(folder / "adapter" / "adapter_model.safetensors"))
    assert len(caches) == 1
    assert 0 < caches[0].size <= budget
    assert found[0].keys() == found[1].keys()
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


def outputs(model: FederatedModel, rows: list[int], width: int = 12) -> ModelOutput:
    with torch.inference_mode():
        return model.model(**batch(rows, width), output_hidden_states=True)


@pytest.mark.parametrize("every", [False, True])
def test_rows_are_the_same_bits_in_any_batch_and_computed_once(every: bool):
    model = adapted()
    model.model.eval()
    batches = [([0, 1, 2], 12), ([2, 10, 21, 5], 12), ([10, 21], 12), ([10, 1], 12), ([3, 0], 8), ([0, 1, 2, 5], 12)]
    wanted = [outputs(model, *given) for given in batches]
    cache = PrefixCache(10**6, every)
    assert cache.attach(model.model, model.all_trained_parameters()) == ""
    computed: list[int] = []
    lowest = model.model.base_model.model.bert.encoder.layer[0].attention
    lowest.register_forward_pre_hook(lambda module, given: computed.append(len(given[0])))
    for given, plain in zip(batches, wanted, strict=True):
        found = outputs(model, *given)
        assert torch.equal(found.logits, plain.logits)
        for place, (ours, theirs) in enumerate(zip(found.hidden_states, plain.hidden_states, strict=True)):
            mask = batch(*given)["attention_mask"].bool()
            if every or place not in (1,):  # what nothing reads is not kept
                assert torch.equal(ours[mask], theirs[mask])
    # Three rows; three new ones; the full rows again, now without padding; a row known; two of another width; none.
    assert computed == [3, 3, 2, 2]
    cache.detach()
    assert torch.equal(outputs(model, *batches[0]).logits, wanted[0].logits)
    assert computed[-1] == 3


@pytest.mark.parametrize("budget", [0, 10**6])
def test_in_training_the_frozen_layers_have_no_dropout_and_the_others_have(budget: int):
    model = adapted()
    cache = PrefixCache(budget, every=True)
    cache.attach(model.model, model.all_trained_parameters())
    model.model.eval()
    still = outputs(model, [0, 1, 2]).hidden_states
    model.model.train()
    torch.manual_seed(1)
    result = model.model(**batch([0, 1, 2]), output_hidden_states=True)
    assert torch.equal(result.hidden_states[2], still[2])
    assert not torch.equal(result.hidden_states[3], still[3])
    assert model.model.training
    result.logits.sum().backward()
    assert all(p.grad is not None for p in model.trained_parameters())
    torch.manual_seed(1)
    again = model.model(**batch([0, 1, 2]))  # what is known already changes no random number
    assert torch.equal(again.logits, result.logits)


def test_a_failure_leaves_nothing_of_a_batch_behind():
    model = adapted()
    model.model.eval()
    wanted = outputs(model, [4, 5]).logits
    cache = PrefixCache(10**6)
    cache.attach(model.model, model.all_trained_parameters())
    top = model.model.base_model.model.bert.encoder.layer[2].output

    def fail(*_: object) -> None:
        raise RuntimeError("full")

    hook = top.register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="full"):
        outputs(model, [0, 1])
    hook.remove()
    with torch.inference_mode():  # embeddings instead of ids: nothing is known of them
        embedded = model.model.base_model.model.bert.embeddings.word_embeddings(batch([4, 5])["input_ids"])
        found = model.model(inputs_embeds=embedded, attention_mask=batch([4, 5])["attention_mask"]).logits
    assert torch.equal(found, wanted)


@pytest.mark.parametrize(
    ("targets", "options", "words"),
    [
        ("query", {}, "the lowest layer is adapted"),
        ("layer.2.attention.self.query,pooler.dense", {}, "beside the layers"),
        ("layer.2.attention.self.query", {"modules_to_save": "word_embeddings"}, "beside the layers"),
        ("query", {"method": "full"}, "beside the layers"),
    ],
)
def test_where_nothing_below_is_frozen_it_says_so(targets: str, options: dict, words: str):
    model = adapted(3, targets, **options)
    assert words in PrefixCache(10**6).attach(model.model, model.all_trained_parameters())


def test_a_language_model_s_lower_layers(tiny_causal: Path):
    base = LlamaForCausalLM.from_pretrained(tiny_causal, num_hidden_layers=3)
    adapter = AdapterSettings(rank=2, num_blocks=2, target_modules="layers.2.self_attn.q_proj")
    model = FederatedModel(base, adapter, ModelSettings(task="causal-lm"), 0)
    model.model.eval()
    rows = {k: v % 10 if k == "input_ids" else v for k, v in batch([0, 3, 5]).items()}
    with torch.inference_mode():
        plain = model.model(**rows).logits
        assert len(frozen_blocks(model.model, model.all_trained_parameters())[0]) == 2
        cache = PrefixCache(10**6)
        cache.attach(model.model, model.all_trained_parameters())
        for _ in range(2):
            assert torch.equal(model.model(**rows, use_cache=False).logits, plain)
        assert len(cache.rows) == 3
        again = model.model(**rows, use_cache=True)  # a cache of keys and values needs every layer's
        assert torch.equal(again.logits, plain)
        assert again.past_key_values.get_seq_length(0) == 12


@pytest.mark.parametrize(
    ("kind", "kept"), [("mpnet", 3), ("deberta-v2", 3), ("gpt_neo", 0)]
)  # the last gives its attention's weights too
@pytest.mark.parametrize("every", [False, True])
def test_layers_that_give_a_tuple(kind: str, kept: int, every: bool):
    torch.manual_seed(0)
    shape = {"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 32, "vocab_size": 50, "pad_token_id": 0}
    own = {"num_layers": 3, "num_heads": 2, "attention_types": [[["global", "local", "global"], 1]], "bos_token_id": 1}
    layers = own if kind == "gpt_neo" else {"num_hidden_layers": 3}
    model = AutoModelForSequenceClassification.from_config(AutoConfig.for_model(kind, **(shape | layers))).eval()
    (blocks,) = (m for m in model.modules() if isinstance(m, torch.nn.ModuleList) and len(m) == 3)
    options = {"use_cache": False} if kind == "gpt_neo" else {}
    wanted = model(**batch([0, 3, 5]), **options).logits
    cache = PrefixCache(10**6, every)
    assert cache.attach(model, list(blocks[2].parameters())) == ""
    for _ in range(2):
        assert torch.equal(model(**batch([0, 3, 5]), **options).logits, wanted)
    assert len(cache.rows) == kept


@pytest.mark.parametrize("kind", ["opt", "starcoder2", "xglm", "gpt_bigcode", "deberta-v2", "falcon"])
def test_no_dropout_is_left_in_a_body_that_has_numbers_for_it(kind: str):
    config = AutoConfig.for_model(kind)
    shape = {"num_attention_heads": 2, "num_hidden_layers": 2, "vocab_size": 50, "pad_token_id": 0}
    config.update({name: 0.5 for name in vars(config) if "drop" in name and isinstance(getattr(config, name), float)})
    config.update(shape | {"hidden_size": 16, "intermediate_size": 32, "ffn_dim": 32, "num_key_value_heads": 2})
    config.update({"word_embed_proj_dim": 16} if kind == "opt" else {})
    body = AutoModel.from_config(config).train()
    rows = batch([0, 3])
    assert not torch.equal(*(body(**rows)[0] for _ in range(2)))
    before = body.config.to_json_string()
    without_dropout(body)
    assert torch.equal(*(body(**rows)[0] for _ in range(2)))
    assert body.config.to_json_string() == before  # it is saved with the model


@pytest.mark.parametrize("dropout", [True, False])
def test_the_base_models_dropout_is_a_setting(dropout: bool, tiny_config, tiny_model: Path, tmp_path: Path):
    base = BertForSequenceClassification.from_pretrained(tiny_model, num_labels=2, hidden_dropout_prob=0.5)
    base.save_pretrained(tmp_path / "model")
    for name in ("vocab.txt", "tokenizer.json", "tokenizer_config.json"):
        if (tiny_model / name).exists():
            shutil.copy(tiny_model / name, tmp_path / "model")
    own = {"model.name": str(tmp_path / "model"), "train.base-dropout": dropout}
    model = Site(parse(tiny_config | own)).model().model.train()
    rows = {name: value % 20 for name, value in batch([0, 3]).items()}  # of the tiny model's words
    passes = [model.base_model.model.bert(**rows)[0] for _ in range(2)]
    assert torch.equal(*passes) is not dropout
    assert model.base_model.model.dropout.p == 0.5  # the head's
