"""Entry points of models that people have: transformers' `generate` and features, timm's features."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from torch import Tensor, nn

from taps_ext import BaseAttributeError, FullConfig, LoraConfig, TapsConfig, TapsError, TaskModel

transformers = pytest.importorskip("transformers")
timm = pytest.importorskip("timm")


def gpt2() -> nn.Module:
    config = transformers.GPT2Config(
        vocab_size=50,
        n_positions=32,
        n_embd=16,
        n_layer=2,
        n_head=2,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
        tie_word_embeddings=False,
    )
    return transformers.GPT2LMHeadModel(config)


def llama() -> nn.Module:
    config = transformers.LlamaConfig(
        vocab_size=50,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=32,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    return transformers.LlamaForCausalLM(config)


def t5() -> nn.Module:
    config = transformers.T5Config(
        vocab_size=50,
        d_model=16,
        d_kv=8,
        d_ff=24,
        num_layers=2,
        num_heads=2,
        decoder_start_token_id=0,
        tie_word_embeddings=False,
    )
    return transformers.T5ForConditionalGeneration(config)


def clip() -> nn.Module:
    small = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.CLIPConfig(
        text_config={**small, "vocab_size": 50, "max_position_embeddings": 12, "eos_token_id": 2},
        vision_config={**small, "image_size": 16, "patch_size": 8},
        projection_dim=8,
    )
    return transformers.CLIPModel(config)


def two_tasks(make, config) -> TaskModel:
    torch.manual_seed(0)
    heads = ["text_projection", "visual_projection"] if make is clip else None  # which look like classifiers
    model = TaskModel(make().eval(), config, head_module=heads)
    for name in ("a", "b"):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # GPT-2's projections are no nn.Linear
            model.add_task(name)
        with torch.no_grad():
            for key, p in model.state(name).named_parameters():
                if not key.endswith("score"):
                    p.add_(0.3 * torch.randn_like(p))
    return model.eval()


def pixels(size: int = 16) -> Tensor:
    return torch.randn(2, 3, size, size)


@pytest.mark.parametrize("make", [gpt2, llama, t5])
@pytest.mark.parametrize("how", [{}, {"num_beams": 2}, {"do_sample": True}], ids=["greedy", "beams", "sampled"])
def test_generate_runs_one_task_throughout(make, how) -> None:
    tied = ["shared", "encoder.embed_tokens", "decoder.embed_tokens"] if make is t5 else None
    model = two_tasks(make, FullConfig(exclude_modules=tied))
    prompt = torch.randint(3, 50, (2, 5))
    how = {**how, "max_new_tokens": 6, "min_new_tokens": 6}

    def run(model: nn.Module, **task: str | None) -> Tensor:
        torch.manual_seed(1)
        return model.generate(prompt, **how, **task)

    want = {name: run(model._plain_copy(name).eval()) for name in ("a", "b")}
    before = run(model.base)
    model.set_task("a")
    assert torch.equal(run(model), want["a"]) and torch.equal(run(model, task="b"), want["b"])
    assert torch.equal(run(model, task=None), before)
    assert len({tuple(tokens.flatten().tolist()) for tokens in (*want.values(), before)}) == 3
    assert model.config is model.base.config and model.generation_config is model.base.generation_config
    assert model.device == torch.device("cpu") and model.dtype == torch.float32
    assert model.can_generate()
    assert model.main_input_name == "input_ids"
    with pytest.raises(TapsError, match="get_input_embeddings: returned a module of the base"):
        model.get_input_embeddings()


def test_a_copy_generates_as_the_model_does() -> None:
    model = two_tasks(llama, LoraConfig(rank=2))
    model.set_task("a")
    prompt = torch.randint(3, 50, (2, 5))
    want = model.generate(prompt, max_new_tokens=4)
    assert torch.equal(copy.deepcopy(model).generate(prompt, max_new_tokens=4), want)


@pytest.mark.parametrize("config", [FullConfig(), TapsConfig(lam=0.5)])
def test_features_of_one_tower(config) -> None:
    model = two_tasks(clip, config)
    x, tokens = pixels(), torch.randint(3, 50, (2, 6))
    plain = model._plain_copy("a").eval()
    for method, given in (("get_image_features", x), ("get_text_features", tokens)):
        got, want = getattr(model, method)(given, task="a"), getattr(plain, method)(given)
        got, want = (v if isinstance(v, Tensor) else v.pooler_output for v in (got, want))
        assert torch.equal(got, want)
    model.train()
    found = model.get_image_features(x, task="a")
    (found if isinstance(found, Tensor) else found.pooler_output).sum().backward()
    trained = [n for n, p in model.state("a").named_parameters() if p.grad is not None and p.grad.any()]
    assert any("vision" in n for n in trained) and not any("text_model" in n for n in trained)


def test_what_transformers_has_for_whole_models(tmp_path) -> None:
    model = two_tasks(clip, TapsConfig(lam=0.5))
    for name, ours in (("save_pretrained", "save_task"), ("push_to_hub", "save_task"), ("load_adapter", "load_task")):
        with pytest.raises(BaseAttributeError, match=ours):
            getattr(model, name)(tmp_path)
    with pytest.raises(TapsError, match="change the base before it is wrapped"):
        model.resize_token_embeddings(60)
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "resnet18"])
@pytest.mark.parametrize("config", [FullConfig(), TapsConfig(lam=0.5, others="task")])
def test_timms_features(name: str, config) -> None:
    torch.manual_seed(0)
    small = {"img_size": 32, "embed_dim": 24, "depth": 2, "num_heads": 2} if name.startswith("vit") else {}
    model = TaskModel(timm.create_model(name, num_classes=5, **small).eval(), config)
    model.add_task("a", num_classes=3)
    with torch.no_grad():
        for key, p in model.state("a").named_parameters():
            if not key.endswith("score"):
                p.add_(0.1 * torch.randn_like(p))
    model.eval().set_task("a")
    x, plain = pixels(32), model._plain_copy("a").eval()
    features = model.forward_features(x)  # with gradients, as merged: without, a CPU's sums are in another order
    assert torch.equal(features, plain.forward_features(x))
    assert torch.equal(model.forward_head(features), model(x)) and torch.equal(model(x), plain(x))
    assert not torch.equal(model.forward_features(x, task=None), features)
    with pytest.raises(BaseAttributeError, match="reset_classifier: .*add_task"):
        model.reset_classifier(7)
    model.train()
    model.forward_features(x).square().sum().backward()
    assert model.default_cfg is model.base.default_cfg


@pytest.mark.filterwarnings("ignore::FutureWarning")  # transformers 5 renames these methods
@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize("active", ["a", None])
def test_checkpointing_is_switched_on_through_the_model(train: bool, active: str | None) -> None:
    """A setting of the base, whichever task is active; in training without one the base runs on stand-ins."""
    model = two_tasks(llama, TapsConfig(lam=0.5)).train(train)
    model.gradient_checkpointing_enable({"use_reentrant": False}, task=active)
    assert model.is_gradient_checkpointing
    model.train()
    tokens = torch.randint(3, 50, (2, 5))
    for name in ("a", "b"):
        model(tokens, task=name).logits.square().sum().backward()
        plain = model._plain_copy(name).requires_grad_().train()
        assert plain.is_gradient_checkpointing
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
