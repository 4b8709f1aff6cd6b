"""Families of ``transformers`` at their own initialization, small: no alarm but the true ones."""

import os
from typing import Any

import pytest
import torch

import svlib as sv

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]  # theirs, and rows left out

INPUTS = 12
TEXT = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "vocab_size": 99,
    "pad_token_id": 0,
}
GROUPED = TEXT | {"num_key_value_heads": 2, "head_dim": 8}
BOTH = {
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 64,
    "decoder_ffn_dim": 64,
    "vocab_size": 99,
    "pad_token_id": 0,
    "decoder_start_token_id": 2,
}
IMAGE = TEXT | {"image_size": 32, "patch_size": 8}
SPEECH = TEXT | {
    "conv_dim": (16, 16, 16),
    "conv_stride": (5, 4, 2),
    "conv_kernel": (10, 8, 4),
    "num_feat_extract_layers": 3,
    "num_conv_pos_embeddings": 8,
    "num_conv_pos_embedding_groups": 4,
}
SMALL_GPT2 = {"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": 99}
WHISPER = BOTH | {"num_mel_bins": 8, "max_source_positions": 20, "max_target_positions": 20}

# configuration, shapes of the inputs, kinds found above a note that a hook confirms
FAMILIES: dict[str, tuple[dict[str, Any], dict[str, tuple[int, ...]], set[str]]] = {
    "bart": (BOTH, {"input_ids": (16,), "decoder_input_ids": (8,)}, set()),
    "beit": (IMAGE, {"pixel_values": (3, 32, 32)}, set()),
    "bert": (TEXT, {"input_ids": (16,)}, set()),
    "bloom": (TEXT | {"n_layer": 2, "n_head": 4}, {"input_ids": (16,)}, set()),
    "dinov2": (IMAGE | {"mlp_ratio": 2}, {"pixel_values": (3, 32, 32)}, set()),
    "fnet": (TEXT, {"input_ids": (16,)}, set()),
    "gpt2": (SMALL_GPT2, {"input_ids": (16,)}, set()),
    "gpt_neox": (TEXT, {"input_ids": (16,)}, set()),
    "hubert": (SPEECH, {"input_values": (1600,)}, set()),
    "mistral": (GROUPED, {"input_ids": (16,)}, set()),
    "mpnet": (TEXT, {"input_ids": (16,)}, set()),
    "qwen3": (GROUPED, {"input_ids": (16,)}, set()),
    "roberta": (TEXT, {"input_ids": (16,)}, set()),
    "t5": (
        {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4, "vocab_size": 99},
        {"input_ids": (16,), "decoder_input_ids": (8,)},
        set(),
    ),
    "whisper": (WHISPER, {"input_features": (8, 40), "decoder_input_ids": (8,)}, set()),
    "vit": (
        IMAGE,
        {"pixel_values": (3, 32, 32)},
        {"collapse"},
    ),  # v²/σ² 0.03 in hooks: its class token outweighs
}


def made(name: str) -> tuple[torch.nn.Module, dict[str, torch.Tensor]]:
    os.environ["HF_HUB_OFFLINE"] = "1"
    transformers = pytest.importorskip("transformers")
    config, shapes, _ = FAMILIES[name]
    torch.manual_seed(0)
    model = transformers.AutoModel.from_config(transformers.AutoConfig.for_model(name, **config))
    generator = torch.Generator().manual_seed(1)
    batch = {
        key: torch.randint(5, 99, (INPUTS, *shape), generator=generator)
        if key.endswith("ids")
        else torch.randn(INPUTS, *shape, generator=generator)
        for key, shape in shapes.items()
    }
    return model.eval(), batch


@pytest.mark.parametrize("name", FAMILIES)
def test_only_true_alarms(name: str) -> None:
    model, batch = made(name)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    found = sv.explain(model, batch).findings
    assert {x.kind for x in found if not x.note} - {"nothing found"} == FAMILIES[name][2], found
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


def test_a_dead_mlp_is_named_among_many_rows() -> None:
    model, batch = made("gpt2")
    torch.nn.init.constant_(model.get_parameter("h.1.mlp.c_fc.bias"), -10.0)
    explanation = sv.explain(model, batch)
    kinds = {x.kind: x.text for x in explanation.findings if not x.note}
    assert "h.1.mlp.c_fc" in kinds.get("dead units", ""), explanation
